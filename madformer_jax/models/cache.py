"""The keys and values that sampling keeps (MADFormer, section 4): an explicit argument and result."""

from typing import NamedTuple

import jax
from jax import Array

from madformer_jax.ops.attention import api
from madformer_jax.ops.attention.api import KV


class StageCache(NamedTuple):
    """Of the layers of a stage, as `attention.kept` gives them: of the image context, of the text; None where there are none."""

    context: KV | None
    text: KV | None


class ModelCache(NamedTuple):
    """Of what has been read or generated, of the two stages."""

    ar: StageCache
    diffusion: StageCache
    lengths: Array | None = None  # (B,) tokens of the text, where it is padded
    finished: Array | None = None  # (B, L, positions, C) the generated blocks, where the U-Net sees its neighbours


def write_block(cache: StageCache, own: KV | None, block: int | Array, implementation: str) -> StageCache:
    """Puts the keys and values of one block (layers, B, 1, s, H, h) into its slot of the context."""
    if cache.context is None or own is None:
        return cache
    own = api.to_cache_layout(own, implementation)
    written = (
        jax.lax.dynamic_update_slice_in_dim(x, y, block * y.shape[axis], axis)
        for x, y, axis in zip(cache.context, own, api.cache_token_axes(implementation), strict=True)
    )
    return cache._replace(context=KV(*written))


def write_finished_block(cache: ModelCache, z: Array, block: int | Array) -> ModelCache:
    """Keeps a generated block (B, 1, positions, C), where the U-Net sees its neighbours."""
    assert cache.finished is not None
    return cache._replace(finished=jax.lax.dynamic_update_slice_in_dim(cache.finished, z, block, axis=1))
