"""Skip-causal attention in block form (section 3.2): masked scores are never computed.

The file has over 400 lines so that all implementations are side by side.

Query block i of either stream attends to the text, to the context blocks before i and to itself.
The context is the clean stream, or the prediction stream if the model has no clean stream. The
visible pairs of blocks are a diagonal and, below it, a triangle that `tiling` cuts into unmasked
attentions. Their results are merged.

`models.transformer` calls `block_attention` in training and `cached_attention` in sampling, and
`models.unet` calls `attend`. To add an implementation, add a branch to these three functions and to
`choose_implementation`.

Shapes: B images, L blocks, s tokens a block, H heads, h head size, T text tokens.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.errors import ConfigError
from madformer_jax.ops.attention import cudnn, pallas_tpu
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_to_tree, is_projected
from madformer_jax.ops.attention.tiling import tiling
from madformer_jax.ops.rope import RotaryTable


class KV(NamedTuple):
    """Keys and values, each `(B, L, s, H, h)` of an image stream or `(B, T, H, h)` of the text."""

    k: Any  # an array or a `ProjectedQK`
    v: Array


class QKV(NamedTuple):
    """Queries, keys and values of one stream. q is None if only keys and values are needed."""

    q: Any  # an array or a `ProjectedQK`
    k: Any
    v: Array

    @property
    def kv(self) -> KV:
        return KV(self.k, self.v)


class PartialAttention(NamedTuple):
    """Float32 attention to some of the keys, before normalization.

    Attributes:
      out: Values weighted with exp(score - max), `(..., s, h)`.
      max: Largest score, `(..., s)`.
      denominator: Sum of the weights, `(..., s)`.
    """

    out: Array
    max: Array
    denominator: Array


def _partial_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> PartialAttention:
    """Computes attention to some of the keys.

    Args:
      q: Scaled queries, `(..., s, h)`.
      k: Keys, `(..., K, h)`.
      v: Values, `(..., K, h)`.
      mask: Visible keys, bool `(..., 1, K)`, at least one of them. None for all.
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


def _column_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Computes attention with the keys down the columns of the scores.

    On a CPU, sums and maxima of columns use whole registers and neither product transposes an
    operand. That is a quarter to a third faster than `_partial_attention`, which in turn takes the
    queries of several blocks in one product.

    Args:
      q: Scaled queries, `(..., h, s)`.
      k: Keys, `(..., K, h)`.
      v: Values, `(..., h, K)`.
      mask: Visible keys, bool `(..., K, 1)`. None for all.

    Returns:
      The output, `(..., h, s)`.
    """
    if k.shape[-2] == 1:  # XLA on CPU does not support a bfloat16 product over one key, which has all the weight
        return jnp.broadcast_to(v, q.shape)
    scores = jnp.einsum("...kh,...hs->...ks", k, q, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-2, keepdims=True))
    out = jnp.einsum("...hk,...ks->...hs", v, weights.astype(v.dtype), preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-2, keepdims=True)).astype(v.dtype)


def with_kernel_layout(x: Array, implementation: str) -> Array:
    """Stores `x` and its gradient in the memory layout that the kernel reads.

    The TPU kernel reads `(B, H, h, S)`, because registers of a TPU have 128 lanes and would be half
    empty with heads of 64 along them. Other implementations keep `x`.

    Args:
      x: Projection, `(B, S, H, h)`.
      implementation: Result of `choose_implementation`.

    Returns:
      `x` with the same shape.
    """
    return jnp.moveaxis(_to_kernel_layout(x, implementation), -1, 1) if implementation == "pallas" else x


def _normalize(x: PartialAttention, dtype: Any) -> Array:
    return (x.out / x.denominator[..., None]).astype(dtype)


def _key_mask(lengths: Array, text_tokens: int, image_tokens: int) -> Array:
    """Returns a mask, bool `(B, text_tokens + image_tokens)`, that hides the padding of the text.

    The first `lengths` `(B,)` text tokens and all image tokens are visible.
    """
    text = jnp.arange(text_tokens) < lengths[:, None]
    return jnp.pad(text, ((0, 0), (0, image_tokens)), constant_values=True)


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    implementation: str = "blocks",
    causal: bool = False,
) -> Array:
    """Computes softmax(q k^T / sqrt(h)) v.

    Args:
      q: Queries, `(B, S, H, h)`.
      k: Keys, `(B, K, H, h)`. The TPU kernel needs K = S.
      v: Values, `(B, K, H, h)`.
      implementation: Result of `unet_implementation`. `pallas` becomes `blocks` if S does not
        divide into tiles.
      causal: Whether query i attends to keys 0..i only.

    Returns:
      The output, `(B, S, H, h)`.
    """
    if k.shape[1] == 1:  # XLA on CPU does not support a bfloat16 product over one key, which has all the weight
        return jnp.broadcast_to(v, q.shape)
    if causal or implementation == "cudnn":
        kernel: Literal["cudnn", "xla"] = "cudnn" if implementation == "cudnn" else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=kernel)
    if implementation in _PALLAS_IMPLEMENTATIONS and (pallas_tpu.tile_size(q.shape[1]) or implementation != "pallas"):
        images = pallas_tpu.images_per_row(len(q))
        rows = QKV(*(x.reshape(len(x) // images, images, *x.shape[1:]) for x in (q, k, v)))
        return _pallas_attention(rows, None, None, None, images, implementation).reshape(q.shape)
    # Normalizing after the product with v takes half the time of jax.nn's attention on a CPU, which
    # passes over the weights more often.
    q, v = (x.transpose(0, 2, 3, 1) for x in (q * q.shape[-1] ** -0.5, v))
    return _column_attention(q, k.swapaxes(1, 2), v).transpose(0, 3, 1, 2)


@jax.named_scope("attention")
def block_attention(
    streams: Sequence[QKV],
    context: KV | None,
    text: KV | None,
    lengths: Array | None = None,
    *,
    implementation: str,
    images: int = 1,
) -> list[Array]:
    """Computes attention of the image streams in training, all blocks at once.

    Args:
      streams: Queries and keys, each an array or a `ProjectedQK`, and values of each stream,
        `(B, L, s, H, h)`. Streams may have different L.
      context: Keys and values of the same form. Query block i attends to its blocks j < i. None
        lets each block attend to itself only (`diffusion_attention = block`).
      text: Keys and values, each `(B, T, H, h)`, to which every query attends, or None.
      lengths: Number of text tokens without padding, `(B,)`. None for all T.
      implementation: Result of `choose_implementation`: reference, blocks, cudnn, pallas, or
        pallas_interpret (the TPU kernel on any platform).
      images: Images in a row, for the TPU kernels: arrays are then
        `(B / images, images * L, s, H, h)` and `(B / images, images * T, H, h)`.

    Returns:
      The output of each stream, shaped like its values.
    """
    if implementation in _PALLAS_IMPLEMENTATIONS:
        return [_pallas_attention(stream, context, text, lengths, images, implementation) for stream in streams]
    streams, context = apply_to_tree((streams, context))
    joint_implementations = {"reference": _reference_attention, "cudnn": _cudnn_attention}
    if implementation in joint_implementations:
        return joint_implementations[implementation](streams, context, text, lengths)
    return [_tiled_attention(stream, context, text, lengths) for stream in streams]


def _tiled_attention(stream: QKV, context: KV | None, text: KV | None, lengths: Array | None) -> Array:
    """Computes attention of one stream in plain JAX.

    The diagonal is one attention of every block to the text and itself. `_add_context_attention`
    adds the triangle below it.
    """
    q, k, v = _require_query(stream)
    batch, blocks, _, heads, size = q.shape

    def heads_first(x: Array) -> Array:
        """Transposes `(B, L, s, H, h)` to `(B, H, L, s, h)`."""
        return x.transpose(0, 3, 1, 2, 4)

    q, k, v = heads_first(q * size**-0.5), heads_first(k), heads_first(v)
    diagonal, mask = KV(k, v), None
    if text is not None:
        shape = (batch, heads, blocks, text.k.shape[1], size)
        repeated = (jnp.broadcast_to(x.swapaxes(1, 2)[:, :, None], shape) for x in text)
        if lengths is not None:
            mask = _key_mask(lengths, text.k.shape[1], k.shape[3])[:, None, None, None]
        diagonal = KV(*(jnp.concatenate(x, axis=3) for x in zip(repeated, diagonal, strict=True)))
    result = _partial_attention(q, *diagonal, mask)
    if context is not None and blocks > 1:
        missing = (1 << (blocks - 1).bit_length()) - context.k.shape[1]  # the tiles take keys from whole pairs
        padding = ((0, 0), (0, 0), (0, max(0, missing)), (0, 0), (0, 0))
        result = _add_context_attention(result, q, KV(*(jnp.pad(heads_first(x), padding) for x in context)))
    return _normalize(result, v.dtype).transpose(0, 2, 3, 1, 4)


def _add_context_attention(result: PartialAttention, q: Array, context: KV) -> PartialAttention:
    """Adds the attention of each block to the context blocks before it.

    Blocks are paired in runs of m = 1, 2, 4, ... blocks. The second m blocks of a pair attend to
    all of the first m. The last pair may be cut off.

    Args:
      result: Attention of each block to the text and itself, `(B, H, L, s, ...)`.
      q: Queries, `(B, H, L, s, h)`.
      context: Keys and values, each `(B, H, blocks, s, h)`.
    """
    batch_heads, blocks = q.shape[:2], q.shape[2]
    for m, tiles in itertools.groupby(tiling(blocks), key=lambda tile: tile.size):
        groups = [(tile.pairs, tile.rows) for tile in tiles]
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
            added = _partial_attention(queries, keys, values)
            second = _merge_partials(
                second, PartialAttention(*(x.reshape(y.shape) for x, y in zip(added, second, strict=True)))
            )
            both = (jnp.concatenate(x, axis=3) for x in zip(first, second, strict=True))
            runs[n] = PartialAttention(*(x.reshape(y.shape) for x, y in zip(both, runs[n], strict=True)))
        result = PartialAttention(*(jnp.concatenate(x, axis=2) for x in zip(*runs, strict=True)))
    return result


def _split_blocks(x: Array, count: int, sizes: tuple[int, int]) -> Sequence[Array]:
    """Splits each of `count` runs of the blocks of `x` in two.

    Args:
      x: `(B, H, blocks, ...)`.
      count: Number of runs.
      sizes: Blocks of the first and of the second part of a run.

    Returns:
      Both parts, each `(B, H, count, size, ...)`.
    """
    return jax.lax.split(x.reshape(*x.shape[:2], count, sum(sizes), *x.shape[3:]), sizes, axis=3)


def _cudnn_attention(streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Array | None) -> list[Array]:
    """Stacks the streams so that one call serves both. Shorter streams are padded with zeros."""
    blocks = max(stream.k.shape[1] for stream in streams)

    def pad_blocks(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, blocks - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    q, k, v = (
        jnp.stack([pad_blocks(x) for x in arrays], axis=2) for arrays in zip(*map(_require_query, streams), strict=True)
    )
    padded = None if context is None else tuple(map(pad_blocks, context))
    out = cudnn.block_attention(q, (k, v), padded, None if text is None else tuple(text), lengths)
    return [out[:, : stream.k.shape[1], n] for n, stream in enumerate(streams)]


def _require_query(stream: QKV) -> tuple[Any, Any, Array]:
    if stream.q is None:
        raise ValueError("a stream without queries can only be context")
    return stream.q, stream.k, stream.v


def to_cache_layout(kv: KV, implementation: str) -> KV:
    """Converts keys and values of all layers to the layout that `cached_attention` reads.

    Args:
      kv: Keys and values, each `(layers, B, n, s, H, h)` or, of the text, `(layers, B, T, H, h)`.
      implementation: Result of `choose_implementation`.
    """
    if implementation == "cudnn":
        return kv
    if implementation in _PALLAS_IMPLEMENTATIONS:
        rows = (_to_kernel_layout(x, "", 2) for x in kv)
        return KV(*(rows if kv.k.ndim == 6 else (pallas_tpu.pad_text_to_lanes(x, 1) for x in rows)))
    k, v = (x.reshape(*x.shape[:2], -1, *x.shape[-2:]) for x in kv)
    return KV(k.transpose(0, 1, 3, 2, 4), v.transpose(0, 1, 3, 4, 2))


def cache_token_axes(implementation: str) -> tuple[int, int]:
    """Returns the axes of cached keys and values along which image blocks are written.

    These are the token axes of `to_cache_layout`. With cuDNN they are the block axes.
    """
    if implementation == "cudnn":
        return 2, 2
    return (4, 4) if implementation in _PALLAS_IMPLEMENTATIONS else (3, 4)


def cache_lengths(lengths: Array | None, text: Array, implementation: str) -> Array | None:
    """Returns the lengths of texts `(B, T)` that `cached_attention` needs.

    The TPU kernel needs a length for every text, because `to_cache_layout` pads them.
    """
    return (
        jnp.full(len(text), text.shape[1]) if lengths is None and implementation in _PALLAS_IMPLEMENTATIONS else lengths
    )


@jax.named_scope("attention")
def cached_attention(
    qkv: QKV,
    context: KV | None,
    text: KV | None,
    layer: int | Array,
    block: int | Array,
    lengths: Array | None = None,
    *,
    implementation: str,
) -> Array:
    """Computes attention of one block against the cache, in sampling.

    The block sees the same keys as in `block_attention`.

    Args:
      qkv: Queries, keys and values of the block, each `(B, 1, s, H, h)`.
      context: Cached keys and values from `to_cache_layout`, whose slots j < block are filled. None
        lets the block attend to itself only.
      text: Cached keys and values of the text from `to_cache_layout`, or None.
      layer: Index of the layer in the cache.
      block: Index i of the block. If traced, it selects one of the programs for each i, so that
        unfilled slots cost nothing. The GPU and TPU kernels take the number of filled slots.
      lengths: Result of `cache_lengths`.

    Returns:
      The output, `(B, 1, s, H, h)`.
    """
    q, k, v = (x[:, 0] for x in _require_query(qkv))
    if implementation in _PALLAS_IMPLEMENTATIONS:
        q, k, v = (_to_kernel_layout(x, implementation) for x in (q, k, v))
        indices = (jnp.asarray(x, jnp.int32) for x in (layer, block))
        kernel = partial(pallas_tpu.cached_attention, interpret=implementation != "pallas")
        return pallas_tpu.shard_map_kernel(kernel, q, (k, v), context, text, lengths, *indices).transpose(0, 3, 1, 2)[
            :, None
        ]

    def select_layer(kv: KV) -> KV:
        return KV(*(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv))

    if implementation == "cudnn":
        context, text = (kv and select_layer(kv) for kv in (context, text))
        return cudnn.cached_attention(q, (k, v), context, text, block, lengths)[:, None]
    tokens = q.shape[1]
    q, v = (x.transpose(0, 2, 3, 1) for x in (q * q.shape[-1] ** -0.5, v))
    self_kv = KV(k.swapaxes(1, 2), v)

    def attend_block(i: int) -> Array:
        # Each branch slices the whole cache. Slices made outside would be copied for every branch.
        sources = [self_kv]
        if context is not None and i:
            cached = select_layer(context)
            sources.insert(0, KV(cached.k[:, :, : i * tokens], cached.v[..., : i * tokens]))
        mask = None
        if text is not None:
            sources.insert(0, select_layer(text))
            if lengths is not None:
                mask = _key_mask(lengths, text.k.shape[3], (i + 1) * tokens)[:, None, :, None]
        ks, vs = zip(*sources, strict=True)
        k, v = jnp.concatenate(ks, axis=2), jnp.concatenate(vs, axis=3)
        return _column_attention(q, k, v, mask).transpose(0, 3, 1, 2)[:, None]

    if context is None or isinstance(block, int):
        return attend_block(int(block) if context is not None else 0)
    return jax.lax.switch(block, [partial(attend_block, i) for i in range(context.k.shape[3] // tokens + 1)])


def _reference_attention(
    streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Array | None
) -> list[Array]:
    """Computes attention with a dense mask over all keys, for tests: (L * s)^2 scores."""
    outputs = []
    for stream in streams:
        q, k, v = _require_query(stream)
        batch, blocks, tokens = q.shape[:3]
        i = jnp.repeat(jnp.arange(blocks), tokens)
        keys, values, masks = (
            [k.reshape(batch, -1, *k.shape[3:])],
            [v.reshape(batch, -1, *v.shape[3:])],
            [i[:, None] == i[None, :]],
        )
        if context is not None:
            j = jnp.repeat(jnp.arange(context.k.shape[1]), tokens)
            keys.append(context.k.reshape(batch, -1, *k.shape[3:]))
            values.append(context.v.reshape(batch, -1, *v.shape[3:]))
            masks.append(i[:, None] > j[None, :])
        if text is not None:
            keys.insert(0, text.k)
            values.insert(0, text.v)
            masks.insert(0, jnp.ones((len(i), text.k.shape[1]), bool))
        k, v, mask = (jnp.concatenate(x, axis=1) for x in (keys, values, masks))
        mask = mask[None]
        if text is not None and lengths is not None:
            mask = mask & _key_mask(lengths, text.k.shape[1], k.shape[1] - text.k.shape[1])[:, None]
        out = jax.nn.dot_product_attention(q.reshape(batch, -1, *q.shape[3:]), k, v, mask=mask[:, None])
        outputs.append(out.reshape(q.shape))
    return outputs


# ---- TPU: Pallas kernels, all blocks of a stream in one call

_PALLAS_IMPLEMENTATIONS = ("pallas", "pallas_interpret")


def images_per_row(implementation: str, batch: int) -> int:
    """Returns how many images of a batch `block_attention` takes in one row of tokens."""
    return pallas_tpu.images_per_row(batch) if implementation in _PALLAS_IMPLEMENTATIONS else 1


def _to_kernel_layout(x: Array, implementation: str, batch_axes: int = 1) -> Array:
    """Converts `(B, L, s, H, h)` or `(B, T, H, h)` to `(B, H, h, tokens)` for the TPU kernels."""
    rows = jnp.moveaxis(x.reshape(*x.shape[:batch_axes], -1, *x.shape[-2:]), -3, -1)
    return pallas_tpu.with_row_major_layout(rows) if implementation == "pallas" else rows


def _pallas_attention(
    stream: QKV, context: KV | None, text: KV | None, lengths: Array | None, images: int, implementation: str
) -> Array:
    """Runs the TPU kernel on one stream."""
    q, k, v = _require_query(stream)
    context_has_self = context is not None and v is context.v  # the stream is its own context

    def tokens_last(x: Any) -> Any:
        if not is_projected(x):
            return _to_kernel_layout(x, implementation)
        return ProjectedQK(
            tokens_last(x.x), x.scale[:, None], RotaryTable(*(y.reshape(-1, y.shape[-1]).T for y in x.position))
        )

    arrays = (q, None if context_has_self else (k, v), context and tuple(context))
    arrays = jax.tree.map(tokens_last, arrays, is_leaf=is_projected)
    padded = None if text is None else tuple(pallas_tpu.pad_text_to_lanes(tokens_last(x), images) for x in text)
    text_tokens = 0 if text is None else text.k.shape[1] // images
    if text_tokens and lengths is None:
        lengths = jnp.full(len(v) * images, text_tokens)
    sizes = {"images": images, "tokens": v.shape[2], "text_tokens": text_tokens}
    kernel = partial(pallas_tpu.block_attention, **sizes, interpret=implementation != "pallas")
    out = pallas_tpu.shard_map_kernel(kernel, *arrays, padded, lengths)
    out = pallas_tpu.with_row_major_layout(out) if implementation == "pallas" else out
    return out.transpose(0, 3, 1, 2).reshape(v.shape)


def choose_implementation(name: str, platform: str, dtype: str, tokens: int, head: int) -> str:
    """Returns the implementation that `config.model.attention` selects on a platform.

    Args:
      name: Value of `config.model.attention`.
      platform: cpu, gpu or tpu.
      dtype: Name of the type of queries, keys and values.
      tokens: Tokens of a block.
      head: Head size.

    Raises:
      ConfigError: The implementation needs another platform, block size, head size or type.
    """
    if name == "cudnn" and platform != "gpu":
        raise ConfigError(
            f"config.model.attention='cudnn' needs an NVIDIA GPU, but the platform is {platform}. Use 'auto'."
        )
    if name == "cudnn" and not (cudnn.supports_head_size(head) and dtype == "bfloat16"):
        raise ConfigError(
            f"config.model.attention='cudnn' needs a head size that is a multiple of 8 and at most "
            f"{cudnn.MAX_HEAD_SIZE}, in bfloat16, but the model has {head} in {dtype}. Use 'auto'."
        )
    if name == "pallas" and platform == "tpu" and not pallas_tpu.tile_size(tokens):
        raise ConfigError(
            f"config.model.attention='pallas' needs blocks of a multiple of {pallas_tpu.LANES} tokens, but the model "
            f"has {tokens}. Use 'auto'."
        )
    if name == "pallas" and platform != "tpu":
        return "pallas_interpret"  # slow: runs the steps of the kernel one by one
    if name != "auto":
        return name
    if platform == "gpu" and dtype == "bfloat16" and cudnn.supports_head_size(head):
        return "cudnn"
    return "pallas" if platform == "tpu" and pallas_tpu.tile_size(tokens) else "blocks"


def unet_implementation(implementation: str, heads: Sequence[int]) -> str:
    """Returns the implementation for the U-Net, given the head sizes of all its stages."""
    fits = implementation in _PALLAS_IMPLEMENTATIONS or (
        implementation == "cudnn" and all(map(cudnn.supports_head_size, heads))
    )
    return implementation if fits else "blocks"
