"""Skip-causal attention in plain JAX, on any platform (section 3.2).

The diagonal is one attention of every block to the text and itself. `_add_context_attention` adds
the triangle below it, tile by tile. Shapes use the letters of `attention.base`.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from madformer_jax.ops.attention.base import (
    KV,
    QKV,
    Attention,
    Block,
    Blocks,
    Index,
    Lengths,
    column_attention,
    key_mask,
    require_query,
    select_layer,
)
from madformer_jax.ops.attention.tiling import tiling


class XlaBlocks(Attention):
    """Attention in plain JAX. Cached keys are `(layers, B, H, tokens, h)`, values `(layers, B, H, h, tokens)`."""

    name = "blocks"
    cache_token_axes = 3, 4

    def stream_attention(self, stream: QKV, context: KV | None, text: KV | None, lengths: Lengths) -> Blocks:
        q, k, v = require_query(stream)
        batch, blocks, _, heads, size = q.shape

        def heads_first(x: Float[Array, "B n s H h"]) -> Float[Array, "B H n s h"]:
            return x.transpose(0, 3, 1, 2, 4)

        q, k, v = heads_first(q * size**-0.5), heads_first(k), heads_first(v)
        diagonal, mask = KV(k, v), None
        if text is not None:
            shape = (batch, heads, blocks, text.k.shape[1], size)
            repeated = (jnp.broadcast_to(x.swapaxes(1, 2)[:, :, None], shape) for x in text)
            if lengths is not None:
                mask = key_mask(lengths, text.k.shape[1], k.shape[3])[:, None, None, None]
            diagonal = KV(*(jnp.concatenate(x, axis=3) for x in zip(repeated, diagonal, strict=True)))
        result = partial_attention(q, *diagonal, mask)
        if context is not None and blocks > 1:
            missing = (1 << (blocks - 1).bit_length()) - context.k.shape[1]  # the tiles take keys from whole pairs
            padding = ((0, 0), (0, 0), (0, max(0, missing)), (0, 0), (0, 0))
            result = _add_context_attention(result, q, KV(*(jnp.pad(heads_first(x), padding) for x in context)))
        return _normalize(result, v.dtype).transpose(0, 2, 3, 1, 4)

    def cached_attention(
        self, qkv: QKV, context: KV | None, text: KV | None, layer: Index, block: Index, lengths: Lengths = None
    ) -> Block:
        q, k, v = (x[:, 0] for x in require_query(qkv))
        tokens = q.shape[1]
        q, v = (x.transpose(0, 2, 3, 1) for x in (q * q.shape[-1] ** -0.5, v))
        self_kv = KV(k.swapaxes(1, 2), v)

        def attend_block(i: int) -> Block:
            # Each branch slices the whole cache. Slices made outside would be copied for every branch.
            sources = [self_kv]
            if context is not None and i:
                cached = select_layer(context, layer)
                sources.insert(0, KV(cached.k[:, :, : i * tokens], cached.v[..., : i * tokens]))
            mask = None
            if text is not None:
                sources.insert(0, select_layer(text, layer))
                if lengths is not None:
                    mask = key_mask(lengths, text.k.shape[3], (i + 1) * tokens)[:, None, :, None]
            ks, vs = zip(*sources, strict=True)
            k, v = jnp.concatenate(ks, axis=2), jnp.concatenate(vs, axis=3)
            return column_attention(q, k, v, mask).transpose(0, 3, 1, 2)[:, None]

        if context is None or isinstance(block, int):
            return attend_block(int(block) if context is not None else 0)
        # One program for each i, so that unfilled slots cost nothing.
        return jax.lax.switch(block, [partial(attend_block, i) for i in range(context.k.shape[3] // tokens + 1)])

    def to_cache_layout(self, kv: KV) -> KV:
        k, v = (x.reshape(*x.shape[:2], -1, *x.shape[-2:]) for x in kv)
        return KV(k.transpose(0, 1, 3, 2, 4), v.transpose(0, 1, 3, 4, 2))


class PartialAttention(NamedTuple):
    """Float32 attention to some of the keys, before normalization.

    Attributes:
      out: Values weighted with exp(score - max).
      max: Largest score.
      denominator: Sum of the weights.
    """

    out: Float[Array, "*rows s h"]
    max: Float[Array, "*rows s"]
    denominator: Float[Array, "*rows s"]


def partial_attention(
    q: Float[Array, "*rows s h"],
    k: Float[Array, "*rows K h"],
    v: Float[Array, "*rows K h"],
    mask: Bool[Array, "... 1 K"] | None = None,
) -> PartialAttention:
    """Computes attention to some of the keys.

    Args:
      q: Scaled queries.
      k: Keys.
      v: Values.
      mask: Visible keys, at least one of them. None for all.
    """
    scores = jnp.einsum("...sh,...kh->...sk", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    maximum = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    out = jnp.einsum("...sk,...kh->...sh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return PartialAttention(out, maximum, weights.sum(axis=-1))


def _merge_partials(a: PartialAttention, b: PartialAttention) -> PartialAttention:
    """Merges the attentions to two disjoint sets of keys."""
    maximum = jnp.maximum(a.max, b.max)
    x, y = jnp.exp(a.max - maximum), jnp.exp(b.max - maximum)
    return PartialAttention(a.out * x[..., None] + b.out * y[..., None], maximum, a.denominator * x + b.denominator * y)


def _normalize(x: PartialAttention, dtype: DTypeLike) -> Float[Array, "..."]:
    return (x.out / x.denominator[..., None]).astype(dtype)


def _add_context_attention(result: PartialAttention, q: Float[Array, "B H L s h"], context: KV) -> PartialAttention:
    """Adds the attention of each block to the context blocks before it.

    Blocks are paired in runs of m = 1, 2, 4, ... blocks. The second m blocks of a pair attend to
    all of the first m. The last pair may be cut off.

    Args:
      result: Attention of each block to the text and itself, `(B, H, L, s, ...)`.
      q: Queries.
      context: Keys and values, each `(B, H, blocks, s, h)`.
    """
    batch_heads, blocks = q.shape[:2], q.shape[2]
    for m, tiles in itertools.groupby(tiling(blocks), key=lambda tile: tile.key_blocks):
        groups = [(tile.groups, tile.query_blocks) for tile in tiles]
        sizes = [count * (m + rows) for count, rows in groups]
        sizes += [blocks - sum(sizes)] if sum(sizes) < blocks else []
        # The gradient of x[a:b] fills an array of zeros; that of lax.split concatenates.
        runs = [PartialAttention(*x) for x in zip(*(jax.lax.split(x, sizes, axis=2) for x in result), strict=True)]
        for n, (queries, (count, rows)) in enumerate(zip(jax.lax.split(q, sizes, axis=2), groups, strict=False)):
            start = sum(sizes[:n])
            first, second = (
                PartialAttention(*x) for x in zip(*(_split_blocks(x, count, (m, rows)) for x in runs[n]), strict=True)
            )
            queries = _split_blocks(queries, count, (m, rows))[1].reshape(*batch_heads, count, -1, q.shape[-1])
            keys, values = (
                _split_blocks(x[:, :, start : start + 2 * m * count], count, (m, m))[0].reshape(
                    *queries.shape[:3], -1, x.shape[-1]
                )
                for x in context
            )
            added = partial_attention(queries, keys, values)
            second = _merge_partials(
                second, PartialAttention(*(x.reshape(y.shape) for x, y in zip(added, second, strict=True)))
            )
            both = (jnp.concatenate(x, axis=3) for x in zip(first, second, strict=True))
            runs[n] = PartialAttention(*(x.reshape(y.shape) for x, y in zip(both, runs[n], strict=True)))
        result = PartialAttention(*(jnp.concatenate(x, axis=2) for x in zip(*runs, strict=True)))
    return result


def _split_blocks(
    x: Float[Array, "B H blocks *rest"], count: int, sizes: tuple[int, int]
) -> Sequence[Float[Array, "B H count _ *rest"]]:
    """Splits each of `count` runs of the blocks of `x` in two.

    Args:
      x: The blocks.
      count: Number of runs.
      sizes: Blocks of the first and of the second part of a run.

    Returns:
      Both parts, each `(B, H, count, size, ...)`.
    """
    return jax.lax.split(x.reshape(*x.shape[:2], count, sum(sizes), *x.shape[3:]), sizes, axis=3)
