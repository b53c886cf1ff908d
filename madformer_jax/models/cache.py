"""The key-value cache of sampling, an explicit argument and result (MADFormer, section 4).

`decoding.Decoding` fills the cache and the decoder layers in `transformer` read it. Arrays have the
layout of the attention implementation, see `ops.attention.base.Attention.to_cache_layout`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from madformer_jax.ops.attention.base import KV, Attention, Index

Layers = KV | tuple[KV, ...]  # arrays of all layers `(layers, B, ...)`, or of each layer `(B, ...)` (`unrolls_layers`)


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
    order: Int[Array | np.ndarray, "*rows L"] | None = (
        None  # raster numbers in the order of generation; None for raster order
    )


def to_cache(kv: KV, attention: Attention) -> Layers:
    """Converts keys and values of all layers to the form in which a `StageCache` holds them.

    Args:
      kv: Keys and values, each `(layers, B, n, s, H, h)` or, of the text, `(layers, B, T, H, h)`.
      attention: Implementation that decides the layout.
    """
    kv = attention.to_cache_layout(kv)
    return tuple(KV(*layer) for layer in zip(*kv, strict=True)) if attention.unrolls_layers else kv


def select_stack(layers: Layers | None, layer: Index) -> KV | None:
    """Returns cached arrays with an axis of layers: all layers, or only `layer` if layers are unrolled."""
    if layers is None or isinstance(layers, KV):
        return layers
    return KV(*(x[None] for x in layers[int(layer)]))


def empty_context(shape: tuple[int, ...], text_tokens: int, dtype: DTypeLike, attention: Attention) -> Layers:
    """Returns the context of a stage without finished blocks.

    Args:
      shape: (layers, B, L, s, H, h).
      text_tokens: Number of text tokens T.
      dtype: Type of keys and values.
      attention: Implementation that decides the layout. If it writes a block before it attends
        (`write_and_attend`), there is room for all blocks and the text, otherwise for all but the last.
    """
    layers, batch, blocks, tokens, *heads = shape
    if not attention.unrolls_layers:
        x = jnp.zeros((layers, batch, blocks - 1, tokens, *heads), dtype)
        return attention.to_cache_layout(KV(x, x))
    x = jnp.zeros((batch, blocks * tokens + text_tokens, *heads), dtype)
    return (KV(x, x),) * layers


def write_block(cache: StageCache, kv: Layers | None, block: Index, attention: Attention) -> StageCache:
    """Writes the keys and values of one block into its slot of the context.

    Args:
      cache: The cache of a stage.
      kv: Keys and values `(layers, B, 1, s, H, h)`, or None if the stage has no layers. Unrolled
        layers have written them already and pass their whole context.
      block: Index of the block.
      attention: Implementation that decides the layout.

    Returns:
      The cache with the block. A cache without context is returned unchanged.
    """
    if cache.context is None or kv is None:
        return cache
    if not isinstance(kv, KV):
        return cache._replace(context=kv)
    assert isinstance(cache.context, KV)
    key_axis, value_axis = attention.cache_token_axes

    def write(x: Array, y: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, y, block * y.shape[axis], axis)

    new = attention.to_cache_layout(kv)
    context = KV(write(cache.context.k, new.k, key_axis), write(cache.context.v, new.v, value_axis))
    return cache._replace(context=context)
