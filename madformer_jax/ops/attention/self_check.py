"""Check of an attention kernel against plain JAX, on the device that will run it.

Tests compile and interpret the Pallas kernels and replace cuDNN's calls. Both may still give other
results on a new chip or compiler. `verified` runs one small case through the kernels and through
`XlaBlocks` before a model is built. If they differ, it logs a warning, and `XlaBlocks` replaces them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from jaxtyping import PyTree

from madformer_jax.errors import first_line
from madformer_jax.ops.attention.base import KV, QKV, Attention
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_to_tree
from madformer_jax.ops.attention.xla_blocks import XlaBlocks
from madformer_jax.ops.rope import RotaryTable

# Relative error |x - y| / |y|. In bfloat16 the implementations have 0.002 to 0.004 (docs/engineering_log.md).
MAX_ERROR = 0.02
_BLOCKS, _HEADS, _TEXT_TOKENS = 2, 2, 3


@functools.cache
def verified(attention: Attention, dtype: str, head_dim: int, tokens: int) -> Attention:
    """Returns `attention`, or `XlaBlocks` with a warning if their results differ on this machine.

    Args:
      attention: The implementation to check. This machine can run it.
      dtype: Name of the type of queries, keys and values.
      head_dim: Head size h.
      tokens: Tokens of a block.
    """
    try:
        error = largest_error(attention, dtype, head_dim, tokens)
    except Exception as failure:  # compilers raise different types
        problem = f"does not run ({type(failure).__name__}: {first_line(failure)})"
    else:
        if error <= MAX_ERROR:
            return attention
        problem = f"differs from plain JAX by {error:.1%}, and rounding explains {MAX_ERROR:.0%}"
    logging.warning(
        "attention %r %s on %s: using %r, which is slower. Please report this.",
        attention.name, problem, jax.devices()[0].device_kind, XlaBlocks.name,
    )  # fmt: skip
    return XlaBlocks()


def largest_error(attention: Attention, dtype: str, head_dim: int, tokens: int) -> float:
    """Returns the largest relative error of outputs and gradients, in training and with the cache."""
    shape = (1, _BLOCKS, tokens, _HEADS, head_dim)
    keys = jax.random.split(jax.random.key(0), 9)
    arrays = [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys[:6]]
    words = [
        jax.random.normal(key, (1, _TEXT_TOKENS, _HEADS, head_dim), jnp.float32).astype(dtype) for key in keys[6:8]
    ]
    weights = jax.random.normal(keys[8], (2, *shape), jnp.float32)
    angles = jax.random.normal(keys[8], shape[1:3] + shape[4:], jnp.float32)
    position, scale = RotaryTable(jnp.cos(angles), jnp.sin(angles)), 1 + 0.3 * jnp.sin(jnp.arange(head_dim))

    def streams_of(arrays: list[Array], scale: Array) -> list[QKV]:
        projections = (ProjectedQK(x, scale, position) for x in (arrays[0], arrays[1], arrays[3], arrays[4]))
        return [QKV(next(projections), next(projections), v) for v in (arrays[2], arrays[5])]

    def run(attention: Attention, arrays: list[Array], words: list[Array]) -> PyTree[Array]:
        text = KV(*words)

        def total(arrays: list[Array], scale: Array, text: KV) -> tuple[Array, PyTree[Array]]:
            streams = streams_of(arrays, scale)
            outputs = attention.block_attention(streams, streams[0].kv, text)
            sums = [jnp.sum(x.astype(jnp.float32) * w) for x, w in zip(outputs, weights, strict=True)]
            return jnp.stack(sums).sum(), outputs

        (_, outputs), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(arrays, scale, text)
        streams = apply_to_tree(streams_of(arrays, scale))
        slots, cached_text = (
            attention.to_cache_layout(KV(*(x[None] for x in kv)))
            for kv in (KV(*(x[:, : _BLOCKS - 1] for x in streams[0].kv)), text)
        )
        last = QKV(*(x[:, _BLOCKS - 1 :] for x in streams[1]))
        lengths = attention.cache_lengths(None, jnp.zeros((1, _TEXT_TOKENS), jnp.int32))
        cached = attention.cached_attention(last, slots, cached_text, 0, _BLOCKS - 1, lengths)
        return outputs, gradients, cached

    actual = jax.jit(functools.partial(run, attention))(arrays, words)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(functools.partial(run, XlaBlocks()))(
            *jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, words))
        )
    return max(_relative_error(x, y) for x, y in zip(*map(jax.tree.leaves, (actual, exact)), strict=True))


def _relative_error(x: Array, y: Array) -> float:
    a, b = (np.asarray(z, np.float64) for z in (x, y))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if np.isfinite(a).all() else float("inf")
