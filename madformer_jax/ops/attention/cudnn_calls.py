"""Calls of cuDNN's flash attention, and the private functions of JAX that make them.

`attention.cudnn` composes skip-causal attention from these calls. `tests.support.flash` has them as
XLA products. Shapes use the letters of `attention.base`; S queries and K keys.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax import Array
from jaxtyping import Float, Int

MAX_HEAD_SIZE = 128


def supports_head_size(head: int) -> bool:
    """Returns whether cuDNN supports this head size on every GPU that has bfloat16."""
    return head % 8 == 0 and head <= MAX_HEAD_SIZE


class PrivateFunctions(NamedTuple):
    """Private functions of JAX that call cuDNN, since `jax.nn` rounds the lse and drops its gradient."""

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., Sequence[Array]]
    mask_types: Any  # an enumeration
    layout: int


def private_functions() -> PrivateFunctions:
    """Returns the private functions of this JAX. No other function names them."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    backward = module._dot_product_attention_bwd_p_wrapper.bind
    return PrivateFunctions(module.dot_product_attention, backward, module.MaskType, module.AttentionLayout.BTNH.value)


@functools.cache
def is_available() -> bool:
    """Returns whether this JAX has the private functions that this module calls. Warns once if not."""
    x, lse = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 1), jnp.float32)
    try:
        inspect.signature(private_functions().forward).bind(x, x, x, **_forward_settings(x, x, None, None))
        jax.eval_shape(lambda x, lse: flash_attention_backward(x, x, x, None, x, lse, x), x, lse)
    except Exception as error:
        logging.warning(
            "attention runs without cuDNN, slower: JAX %s has other private functions (%s: %s)",
            jax.__version__, type(error).__name__, error,
        )  # fmt: skip
        return False
    return True


def flash_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B K H h"],
    v: Float[Array, "B K H h"],
    lengths: Int[Array, " B"] | None = None,
    *,
    queries: int | None = None,
) -> tuple[Float[Array, "B S H h"], Float[Array, "B S H"]]:
    """Computes softmax(q k^T / sqrt(h)) v and the log-sum-exp of the scores.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      lengths: Number of leading keys that each row attends to. None for all.
      queries: Number of leading queries of each row to compute. None for all.

    Returns:
      The output, and the lse in float32. Both are undefined behind the first `queries`.
    """
    out, lse = private_functions().forward(q, k, v, **_forward_settings(q, k, lengths, queries))
    return out, lse.swapaxes(1, 2)


def flash_attention_backward(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B K H h"],
    v: Float[Array, "B K H h"],
    lengths: Int[Array, " B"] | None,
    out: Float[Array, "B S H h"],
    lse: Float[Array, "B S H"],
    gradient: Float[Array, "B S H h"],
    *,
    queries: int | None = None,
) -> tuple[Float[Array, "B S H h"], Float[Array, "B K H h"], Float[Array, "B K H h"]]:
    """Computes the gradients of q, k and v.

    `out` and `lse` have the form of `flash_attention`. They may belong to more keys than `k` holds.
    Queries behind the first `queries` have no effect, and their gradients are undefined.
    """
    unused, functions = jnp.zeros(0, q.dtype), private_functions()
    *sequence_lengths, mask_type = _padding_mask(q, k, lengths, queries)
    sequence_lengths = [unused if x is None else x for x in sequence_lengths]
    gradients = functions.backward(
        q, k, v, unused, *sequence_lengths, unused, unused, unused, unused,
        lse.swapaxes(1, 2), out, gradient,
        scale=_softmax_scale(q), seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=mask_type,
        layout=functions.layout, sliding_window_length=None,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


def _forward_settings(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    lengths: Int[Array, " B"] | None,
    queries: int | None,
) -> dict[str, Any]:
    q_lengths, kv_lengths, mask_type = _padding_mask(q, k, lengths, queries)
    return {
        "q_seqlen": q_lengths, "kv_seqlen": kv_lengths, "scale": _softmax_scale(q), "mask_type": mask_type,
        "return_residual": True,
    }  # fmt: skip


def _padding_mask(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    lengths: Int[Array, " B"] | None,
    queries: int | None,
) -> tuple[Int[Array, " B"] | None, Int[Array, " B"] | None, Any]:
    """Returns the numbers of queries and keys of each row, and cuDNN's mask type."""
    mask_types = private_functions().mask_types
    if lengths is None and queries is None:
        return None, None, mask_types.NO_MASK
    q_lengths = jnp.full(q.shape[0], q.shape[1] if queries is None else queries, jnp.int32)
    kv_lengths = jnp.full(k.shape[0], k.shape[1], jnp.int32) if lengths is None else lengths
    return q_lengths, kv_lengths, mask_types.PADDING


def _softmax_scale(q: Array | jax.ShapeDtypeStruct) -> float:
    return float(q.shape[-1]) ** -0.5
