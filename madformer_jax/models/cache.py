"""The keys and values that sampling keeps (MADFormer, section 4): an explicit argument and result, as a tree like the layers'."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.models.attention import KV


class Cache(NamedTuple):
    """Of one layer, or stacked over layers: of the image context (B, slots, s, H, h), of the text (B, T, H, h)."""

    context: KV | None
    text: KV | None


class StackCache(NamedTuple):
    """Of a stage: of the scanned layers (stacked on a leading axis) and of the last one."""

    body: Cache | None
    last: Cache | None


class ModelCache(NamedTuple):
    """Of what has been read or generated, of the two stages."""

    ar: StackCache
    diffusion: StackCache
    lengths: Array | None = None  # (B,) tokens of the text, where it is padded
    finished: Array | None = None  # (B, L, positions, C) the generated blocks, where the U-Net sees its neighbours


StackKV = tuple[KV | None, KV | None]  # what one pass through a stage gives, of (body, last)


def empty_stage(layers: int, context: tuple[int, ...] | None, text: tuple[int, ...] | None, dtype: Any) -> StackCache:
    """A stage's cache with nothing in it; `context` and `text` are the shapes of one layer's keys, None where there are none."""

    def zeros(stacked: tuple[int, ...], shape: tuple[int, ...] | None) -> KV | None:
        if shape is None:
            return None
        x = jnp.zeros((*stacked, *shape), dtype)
        return KV(x, x)

    def cache(*stacked: int) -> Cache:
        return Cache(zeros(stacked, context), zeros(stacked, text))

    return StackCache(cache(layers - 1) if layers > 1 else None, cache() if layers else None)


def write_block(cache: StackCache, own: StackKV, block: int | Array) -> StackCache:
    """Puts the keys and values of one block (..., B, 1, s, H, h) into its slot of the context (..., B, slots, s, H, h)."""

    def fill(cache: Cache | None, own: KV | None) -> Cache | None:
        if cache is None or own is None or cache.context is None:
            return cache
        axis = own.k.ndim - 4
        kv = (jax.lax.dynamic_update_slice_in_dim(x, y, block, axis) for x, y in zip(cache.context, own, strict=True))
        return cache._replace(context=KV(*kv))

    return StackCache(*map(fill, cache, own))


def write_text(cache: StackCache, own: StackKV) -> StackCache:
    """Puts the keys and values of the text (..., B, T, H, h) into the cache."""

    def fill(cache: Cache | None, own: KV | None) -> Cache | None:
        return None if cache is None else cache._replace(text=own)

    return StackCache(*map(fill, cache, own))


def write_finished(cache: ModelCache, z: Array, block: int | Array) -> ModelCache:
    """Keeps a generated block (B, 1, positions, C), where the U-Net sees its neighbours."""
    assert cache.finished is not None
    return cache._replace(finished=jax.lax.dynamic_update_slice_in_dim(cache.finished, z, block, axis=1))
