"""Choice of the implementation of skip-causal attention (section 3.2).

`models.madformer.build` calls `choose`. `attention.base` says how to add an implementation.
"""

from madformer_jax.errors import ConfigError
from madformer_jax.ops.attention.base import Attention
from madformer_jax.ops.attention.cudnn import CudnnAttention
from madformer_jax.ops.attention.dense_mask import DenseMask
from madformer_jax.ops.attention.pallas import PallasAttention
from madformer_jax.ops.attention.xla_blocks import XlaBlocks

# "auto" takes the first that supports the case. `DenseMask`, for tests, comes after one that always does.
IMPLEMENTATIONS: dict[str, Attention] = {
    x.name: x for x in (CudnnAttention(), PallasAttention(), XlaBlocks(), DenseMask())
}


def choose(name: str, device: str, dtype: str, head_dim: int, tokens: int) -> Attention:
    """Returns the implementation that `config.model.attention` selects.

    Args:
      name: "auto" or a key of `IMPLEMENTATIONS`.
      device: cpu, gpu or tpu.
      dtype: Name of the type of queries, keys and values.
      head_dim: Head size.
      tokens: Tokens of a block.

    Raises:
      ConfigError: The implementation needs another device, type, head size or block size.
    """
    if name == "auto":
        chosen = next(x for x in IMPLEMENTATIONS.values() if x.supports(device, dtype, head_dim, tokens))
        return chosen.for_device(device)
    chosen = IMPLEMENTATIONS[name].for_device(device)
    if not chosen.supports(device, dtype, head_dim, tokens):
        raise ConfigError(
            f"config.model.attention={name!r} needs {chosen.requirements}, but the model has blocks of {tokens} tokens "
            f"and heads of {head_dim} in {dtype}, on {device}. Use 'auto'."
        )
    return chosen
