"""Choice of the implementation of skip-causal attention (section 3.2).

`models.madformer.build` calls `choose`. `attention.base` says how to add an implementation.
"""

import pkgutil

import jax

from madformer_jax.config import choices
from madformer_jax.errors import ConfigError
from madformer_jax.ops.attention.base import Attention
from madformer_jax.ops.attention.self_check import verified

IMPLEMENTATIONS: dict[str, Attention] = {
    name: pkgutil.resolve_name(f"{__package__}.{path}")() for name, path in choices.ATTENTION.items()
}


def choose(name: str, device: str, dtype: str, head_dim: int, tokens: int) -> Attention:
    """Returns the implementation that `config.model.attention` selects.

    On a TPU or GPU the kernels first compute one small case. If the result is wrong, `blocks` is
    returned.

    Args:
      name: "auto" or a key of `choices.ATTENTION`.
      device: cpu, gpu or tpu.
      dtype: Name of the type of queries, keys and values.
      head_dim: Head size.
      tokens: Tokens of a block.

    Raises:
      ConfigError: The implementation needs another device, type, head size or block size.
    """
    if name == "auto":
        first = next(x for x in IMPLEMENTATIONS.values() if x.supports(device, dtype, head_dim, tokens))
        return _checked(first, dtype, head_dim, tokens)
    chosen = IMPLEMENTATIONS[name].for_device(device)
    if not chosen.supports(device, dtype, head_dim, tokens):
        raise ConfigError(
            f"config.model.attention={name!r} needs {chosen.requirements}, but the model has blocks of {tokens} tokens "
            f"and heads of {head_dim} in {dtype}, on {device}. Use 'auto'."
        )
    return _checked(chosen, dtype, head_dim, tokens)


def _checked(attention: Attention, dtype: str, head_dim: int, tokens: int) -> Attention:
    """Returns `attention`, or `blocks` if its kernels give wrong results on this TPU or GPU."""
    if jax.default_backend() != attention.kernel_platform:  # a program that is compiled for other machines
        return attention
    return verified(attention, dtype, head_dim, tokens)
