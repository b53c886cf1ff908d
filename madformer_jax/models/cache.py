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

Layers = KV | tuple[KV, ...]  # arrays of all layers `(layers, B, ...)`, or of each layer `(B, ...)` (`layers_apart`)


class StageCache(NamedTuple):
    """Keys and values of the layers of one stage."""

    context: Layers | None  # of the finished blocks; None if nothing reads them
    text: Layers | None  # None for an unconditional model, and before `cache_text`


class ModelCache(NamedTuple):
    """Everything that sampling has read or generated so far."""

    ar: StageCache
    diffusion: StageCache
    lengths: Int[Array, " B"] | None = None  # number of text tokens, if the text is padded
    finished_blocks: Float[Array, "B L positions C"] | None = None  # if the U-Net reads neighbors
    order: Int[Array | np.ndarray, "*rows L"] | None = None  # place of each block; None for raster order


def to_cache(kv: KV, attention: Attention) -> Layers:
    """Converts keys and values of all layers to the form in which a `StageCache` holds them.

    Args:
      kv: Keys and values, each `(layers, B, n, s, H, h)` or, of the text, `(layers, B, T, H, h)`.
      attention: Implementation that decides the layout.
    """
    kv = attention.to_cache_layout(kv)
    return tuple(KV(*layer) for layer in zip(*kv, strict=True)) if attention.layers_apart else kv


def select_stack(layers: Layers | None, layer: int | Int[Array, ""]) -> KV | None:
    """Returns cached arrays with an axis of layers: all of them, or that of one layer if they are apart."""
    if layers is None or isinstance(layers, KV):
        return layers
    return KV(*(x[None] for x in layers[int(layer)]))


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
    key_axis, value_axis = (axis - attention.layers_apart for axis in attention.cache_token_axes)

    def write(x: Array, y: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, y, block * y.shape[axis], axis)

    def write_kv(old: KV, new: KV) -> KV:
        return KV(write(old.k, new.k, key_axis), write(old.v, new.v, value_axis))

    new = to_cache(kv, attention)
    if isinstance(cache.context, KV) and isinstance(new, KV):
        return cache._replace(context=write_kv(cache.context, new))
    return cache._replace(context=tuple(map(write_kv, cache.context, new)))
