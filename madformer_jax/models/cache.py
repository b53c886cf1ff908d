"""The key-value cache of sampling, an explicit argument and result (MADFormer, section 4).

`decoding.Decoding` fills the cache and the decoder layers in `transformer` read it. Arrays have the
layout of the attention implementation, see `ops.attention.base.Attention.to_cache_layout`.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from madformer_jax.ops.attention.base import KV, Attention


class StageCache(NamedTuple):
    """Keys and values of the layers of one stage."""

    context: KV | None  # of the finished blocks; None if nothing reads them
    text: KV | None  # None for an unconditional model, and before `cache_text`


class ModelCache(NamedTuple):
    """Everything that sampling has read or generated so far."""

    ar: StageCache
    diffusion: StageCache
    lengths: Int[Array, " B"] | None = None  # number of text tokens, if the text is padded
    finished_blocks: Float[Array, "B L positions C"] | None = None  # if the U-Net reads neighbors
    order: Int[Array | np.ndarray, "*rows L"] | None = None  # place of each block; None for raster order


def write_block(cache: StageCache, kv: KV | None, block: int | Int[Array, ""], attention: Attention) -> StageCache:
    """Writes the keys and values of one block into its slot of the context.

    Args:
      cache: The cache of a stage.
      kv: Keys and values `(layers, B, 1, s, H, h)`, or None if the stage has no layers.
      block: Index of the block.
      attention: Implementation that decides the layout.

    Returns:
      The cache with the block. A cache without context is returned unchanged.
    """
    if cache.context is None or kv is None:
        return cache
    kv = attention.to_cache_layout(kv)
    written = (
        jax.lax.dynamic_update_slice_in_dim(x, y, block * y.shape[axis], axis)
        for x, y, axis in zip(cache.context, kv, attention.cache_token_axes, strict=True)
    )
    return cache._replace(context=KV(*written))
