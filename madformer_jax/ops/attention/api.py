"""Skip-causal attention (MADFormer, section 3.2) in block form: what is masked is never computed.

Every query block i, of either stream, sees the text, the context blocks before i, and itself; the context is the clean
stream, or the prediction stream when there is no clean one. All visible pairs of blocks are a diagonal and, below it, a
triangle that falls apart into squares: unmasked attentions, whose results are merged. Over 400 lines, so that all its forms
stand side by side.
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
    """Keys and values, (B, blocks, s, H, h) of an image stream or (B, T, H, h) of the text."""

    k: Any  # or what gives them, `Projected`
    v: Array


class QKV(NamedTuple):
    """Queries, keys and values of one stream; q is None where only its keys and values are wanted."""

    q: Any
    k: Any
    v: Array

    @property
    def kv(self) -> KV:
        return KV(self.k, self.v)


class PartialAttention(NamedTuple):
    """Attention to some of the keys, which `_merge` joins with that to others; in float32.

    out (..., s, h): the values weighted with exp(score - top); top (..., s): the largest score; total (..., s): the sum of the
    weights.
    """

    out: Array
    top: Array
    total: Array


def _partial_attention(q: Array, k: Array, v: Array, seen: Array | None = None) -> PartialAttention:
    """Scaled queries (..., s, h) on keys and values (..., K, h); `seen` (..., 1, K) leaves keys out, never all of them."""
    scores = jnp.einsum("...sh,...kh->...sk", q, k, preferred_element_type=jnp.float32)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("...sk,...kh->...sh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return PartialAttention(out, top, weights.sum(axis=-1))


def _merge_partials(a: PartialAttention, b: PartialAttention) -> PartialAttention:
    """The attention to both parts' keys."""
    top = jnp.maximum(a.top, b.top)
    x, y = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return PartialAttention(a.out * x[..., None] + b.out * y[..., None], top, a.total * x + b.total * y)


def _column_attention(q: Array, k: Array, v: Array, seen: Array | None = None) -> Array:
    """Attention of scaled queries (..., h, s) to keys (..., K, h) and values (..., h, K), (..., h, s); `seen` (..., K, 1).

    Keys stand down the columns of the scores: on a CPU sums and maxima of columns take whole registers, and neither product
    turns an operand. That is a quarter to a third faster than `_attend_to`, which takes queries of several blocks as one.
    """
    if k.shape[-2] == 1:  # it gets all the weight; XLA on CPU cannot take a product over one key in bfloat16
        return jnp.broadcast_to(v, q.shape)
    scores = jnp.einsum("...kh,...hs->...ks", k, q, preferred_element_type=jnp.float32)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-2, keepdims=True))
    out = jnp.einsum("...hk,...ks->...hs", v, weights.astype(v.dtype), preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-2, keepdims=True)).astype(v.dtype)


def with_kernel_layout(x: Array, implementation: str) -> Array:
    """X (B, S, H, h), and its gradient, in memory as (B, H, h, S) where that is what the kernel reads: a TPU's registers are
    128 wide, and half empty with heads of 64 along them.
    """
    return jnp.moveaxis(_to_kernel_layout(x, implementation), -1, 1) if implementation == "pallas" else x


def _normalize(part: PartialAttention, dtype: Any) -> Array:
    return (part.out / part.total[..., None]).astype(dtype)


def _key_mask(lengths: Array, words: int, others: int) -> Array:
    """Which keys are seen, bool (B, words + others): the first are a text, of which `lengths` (B,) tokens are no padding."""
    return jnp.pad(jnp.arange(words) < lengths[:, None], ((0, 0), (0, others)), constant_values=True)


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    implementation: str = "blocks",
    causal: bool = False,
) -> Array:
    """softmax(q k^T / sqrt(h)) v for q (B, S, H, h), k and v (B, K, H, h).

    With pallas S = K; where tiles do not fit them, they go the way of `blocks`.
    """
    if k.shape[1] == 1:  # it gets all the weight; XLA on CPU cannot take a product over one key in bfloat16
        return jnp.broadcast_to(v, q.shape)
    if causal or implementation == "cudnn":
        kernel: Literal["cudnn", "xla"] = "cudnn" if implementation == "cudnn" else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=kernel)
    if implementation in _PALLAS_IMPLEMENTATIONS and (pallas_tpu.tile_size(q.shape[1]) or implementation != "pallas"):
        images = pallas_tpu.images_per_row(len(q))
        rows = QKV(*(x.reshape(len(x) // images, images, *x.shape[1:]) for x in (q, k, v)))
        return _pallas_attention(rows, None, None, None, images, implementation).reshape(q.shape)
    # normalised after the product with v: on a CPU half the time of jax.nn's, which passes over the weights more often
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
    """Attention of the image streams in training, all blocks at once.

    Args:
      streams: what gives queries and their own keys, `Projected`, and values, (B, blocks, s, H, h); some may have fewer blocks.
      context: keys and values, likewise, whose blocks j < i query block i sees; None lets each block see only itself
        (`diffusion_attention = block`).
      text: (B, T, H, h) keys and values that every query sees, or None.
      lengths: (B,) tokens of the text; what stands behind them is padding, which nobody sees. None: all T are text.
      implementation: what `choose` gives: reference, blocks, cudnn, pallas, or pallas_interpret (the TPU's kernel anywhere).
      images: with pallas, so many images stand one after the other: (B / images, images * blocks, s, H, h), and text likewise.

    Returns:
      One output (B, blocks, s, H, h) for each stream, or as `images` has them.
    """
    if implementation in _PALLAS_IMPLEMENTATIONS:
        return [_pallas_attention(stream, context, text, lengths, images, implementation) for stream in streams]
    streams, context = apply_to_tree((streams, context))
    at_once = {"reference": _reference_attention, "cudnn": _cudnn_attention}
    if implementation in at_once:
        return at_once[implementation](streams, context, text, lengths)
    return [_tiled_attention(stream, context, text, lengths) for stream in streams]


def _tiled_attention(stream: QKV, context: KV | None, text: KV | None, lengths: Array | None) -> Array:
    """The diagonal as one attention of every block to itself and the text, the triangle below it as squares of 1, 2, 4, ...
    blocks: `_see_before`.
    """
    q, k, v = _require_query(stream)
    batch, blocks, _, heads, size = q.shape

    def ordered(x: Array) -> Array:
        """(B, blocks, s, H, h) -> (B, H, blocks, s, h)."""
        return x.transpose(0, 3, 1, 2, 4)

    q, k, v = ordered(q * size**-0.5), ordered(k), ordered(v)
    own, seen = KV(k, v), None
    if text is not None:
        shape = (batch, heads, blocks, text.k.shape[1], size)
        words = (jnp.broadcast_to(x.swapaxes(1, 2)[:, :, None], shape) for x in text)
        if lengths is not None:
            seen = _key_mask(lengths, text.k.shape[1], k.shape[3])[:, None, None, None]
        own = KV(*(jnp.concatenate(x, axis=3) for x in zip(words, own, strict=True)))
    part = _partial_attention(q, *own, seen)
    if context is not None and blocks > 1:
        missing = (1 << (blocks - 1).bit_length()) - context.k.shape[1]  # whole pairs to take keys from
        padding = ((0, 0), (0, 0), (0, max(0, missing)), (0, 0), (0, 0))
        part = _add_context_attention(part, q, KV(*(jnp.pad(ordered(x), padding) for x in context)))
    return _normalize(part, v.dtype).transpose(0, 2, 3, 1, 4)


def _add_context_attention(part: PartialAttention, q: Array, context: KV) -> PartialAttention:
    """Adds what each block sees of the context blocks before it; q and context (B, H, blocks, s, h), part likewise.

    In pairs of m blocks, m = 1, 2, 4, ..., the second m blocks see all of the first m. The last pair may be cut off.
    """
    heads, blocks = q.shape[:2], q.shape[2]
    for m, found in itertools.groupby(tiling(blocks), key=lambda square: square.size):
        groups = [(square.pairs, square.rows) for square in found]
        sizes = [count * (m + rows) for count, rows in groups]
        sizes += [blocks - sum(sizes)] if sum(sizes) < blocks else []
        # lax.split, because the gradient of x[a:b] is an array of zeros with a part filled
        parts = [PartialAttention(*x) for x in zip(*(jax.lax.split(x, sizes, axis=2) for x in part), strict=True)]
        for n, (queries, (count, rows)) in enumerate(zip(jax.lax.split(q, sizes, axis=2), groups, strict=False)):
            start = sum(sizes[:n])
            first, second = (
                PartialAttention(*x) for x in zip(*(_split_blocks(x, count, (m, rows)) for x in parts[n]), strict=True)
            )
            queries = _split_blocks(queries, count, (m, rows))[1].reshape(*heads, count, -1, q.shape[-1])
            keys, values = (
                _split_blocks(x[:, :, start : start + 2 * m * count], count, (m, m))[0].reshape(
                    *queries.shape[:3], -1, x.shape[-1]
                )
                for x in context
            )
            seen = _partial_attention(queries, keys, values)
            second = _merge_partials(
                second, PartialAttention(*(x.reshape(y.shape) for x, y in zip(seen, second, strict=True)))
            )
            both = (jnp.concatenate(x, axis=3) for x in zip(first, second, strict=True))
            parts[n] = PartialAttention(*(x.reshape(y.shape) for x, y in zip(both, parts[n], strict=True)))
        part = PartialAttention(*(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True)))
    return part


def _split_blocks(x: Array, count: int, sizes: tuple[int, int]) -> Sequence[Array]:
    """(B, H, blocks, ...) in `count` runs of blocks, each split in two: (B, H, count, size, ...)."""
    return jax.lax.split(x.reshape(*x.shape[:2], count, sum(sizes), *x.shape[3:]), sizes, axis=3)


def _cudnn_attention(streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Array | None) -> list[Array]:
    """The streams side by side in each block, so that one call serves both; a stream that is shorter ends in zeros."""
    blocks = max(stream.k.shape[1] for stream in streams)

    def filled(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, blocks - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    q, k, v = (
        jnp.stack([filled(x) for x in parts], axis=2) for parts in zip(*map(_require_query, streams), strict=True)
    )
    source = None if context is None else tuple(map(filled, context))
    out = cudnn.block_attention(q, (k, v), source, None if text is None else tuple(text), lengths)
    return [out[:, : stream.k.shape[1], n] for n, stream in enumerate(streams)]


def _require_query(stream: QKV) -> tuple[Any, Any, Array]:
    if stream.q is None:
        raise ValueError("a stream without queries can only be context")
    return stream.q, stream.k, stream.v


def to_cache_layout(kv: KV, implementation: str) -> KV:
    """Keys and values of all layers, (layers, B, n, s, H, h) or the text's (layers, B, T, H, h), as `cached_attention` reads them."""
    if implementation == "cudnn":
        return kv
    if implementation in _PALLAS_IMPLEMENTATIONS:
        last = (_to_kernel_layout(x, "", 2) for x in kv)
        return KV(*(last if kv.k.ndim == 6 else (pallas_tpu.pad_text_to_lanes(x, 1) for x in last)))
    k, v = (x.reshape(*x.shape[:2], -1, *x.shape[-2:]) for x in kv)
    return KV(k.transpose(0, 1, 3, 2, 4), v.transpose(0, 1, 3, 4, 2))


def cache_token_axes(implementation: str) -> tuple[int, int]:
    """Along which axes of image blocks' keys and values, as `kept` gives them, tokens stand; with cuDNN blocks do."""
    if implementation == "cudnn":
        return 2, 2
    return (4, 4) if implementation in _PALLAS_IMPLEMENTATIONS else (3, 4)


def cache_lengths(lengths: Array | None, text: Array, implementation: str) -> Array | None:
    """The lengths of texts (B, T), which the TPU's kernel has to be told of all: `kept` fills them up."""
    return (
        jnp.full(len(text), text.shape[1]) if lengths is None and implementation in _PALLAS_IMPLEMENTATIONS else lengths
    )


@jax.named_scope("attention")
def cached_attention(
    own: QKV,
    context: KV | None,
    text: KV | None,
    layer: int | Array,
    block: int | Array,
    lengths: Array | None = None,
    *,
    implementation: str,
) -> Array:
    """Attention of one block against the cache, in sampling; the same rule as `block_attention`.

    Args:
      own: queries, keys and values of the block, each (B, 1, s, H, h).
      context: cached keys and values as `kept` gives them, of which slots j < block are filled; None: see only itself.
      text: likewise, or None.
      layer: index of the layer whose keys are read.
      block: index i of the block. Traced, it selects among one program for each i, so that unfilled slots cost nothing;
        the kernels of a GPU and a TPU are told how many are filled.
      lengths: see `block_attention`.

    Returns:
      (B, 1, s, H, h).
    """
    q, k, v = (x[:, 0] for x in _require_query(own))
    if implementation in _PALLAS_IMPLEMENTATIONS:
        q, k, v = (_to_kernel_layout(x, implementation) for x in (q, k, v))
        numbers = (jnp.asarray(x, jnp.int32) for x in (layer, block))
        cached = partial(pallas_tpu.cached_attention, interpret=implementation != "pallas")
        return pallas_tpu.shard_map_kernel(cached, q, (k, v), context, text, lengths, *numbers).transpose(0, 3, 1, 2)[
            :, None
        ]

    def of_layer(kv: KV) -> KV:
        return KV(*(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv))

    if implementation == "cudnn":
        context, text = (kv and of_layer(kv) for kv in (context, text))
        return cudnn.cached_attention(q, (k, v), context, text, block, lengths)[:, None]
    tokens = q.shape[1]
    q, v = (x.transpose(0, 2, 3, 1) for x in (q * q.shape[-1] ** -0.5, v))
    itself = KV(k.swapaxes(1, 2), v)

    def at(i: int) -> Array:
        # each branch cuts what it sees out of the whole cache: what is cut before is copied for them
        parts = [itself]
        if context is not None and i:
            cached = of_layer(context)
            parts.insert(0, KV(cached.k[:, :, : i * tokens], cached.v[..., : i * tokens]))
        seen = None
        if text is not None:
            parts.insert(0, of_layer(text))
            if lengths is not None:
                seen = _key_mask(lengths, text.k.shape[3], (i + 1) * tokens)[:, None, :, None]
        ks, vs = zip(*parts, strict=True)
        k, v = jnp.concatenate(ks, axis=2), jnp.concatenate(vs, axis=3)
        return _column_attention(q, k, v, seen).transpose(0, 3, 1, 2)[:, None]

    if context is None or isinstance(block, int):
        return at(int(block) if context is not None else 0)
    return jax.lax.switch(block, [partial(at, i) for i in range(context.k.shape[3] // tokens + 1)])


def _reference_attention(
    streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Array | None
) -> list[Array]:
    """The dense mask over all keys, for tests: (blocks * s)^2 scores."""
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
    """How many images `block_attention` takes one after the other."""
    return pallas_tpu.images_per_row(batch) if implementation in _PALLAS_IMPLEMENTATIONS else 1


def _to_kernel_layout(x: Array, implementation: str, batch_axes: int = 1) -> Array:
    """X (B, blocks, s, H, h) or (B, T, H, h), as the kernels take it: (B, H, h, tokens)."""
    rows = jnp.moveaxis(x.reshape(*x.shape[:batch_axes], -1, *x.shape[-2:]), -3, -1)
    return pallas_tpu.with_row_major_layout(rows) if implementation == "pallas" else rows


def _pallas_attention(
    stream: QKV, context: KV | None, text: KV | None, lengths: Array | None, images: int, implementation: str
) -> Array:
    q, k, v = _require_query(stream)
    inside = context is not None and v is context.v  # own keys are in the context

    def last(x: Any) -> Any:
        if not is_projected(x):
            return _to_kernel_layout(x, implementation)
        return ProjectedQK(
            last(x.x), x.scale[:, None], RotaryTable(*(y.reshape(-1, y.shape[-1]).T for y in x.position))
        )

    given = jax.tree.map(last, (q, None if inside else (k, v), context and tuple(context)), is_leaf=is_projected)
    words = None if text is None else tuple(pallas_tpu.pad_text_to_lanes(last(x), images) for x in text)
    length = 0 if text is None else text.k.shape[1] // images
    if length and lengths is None:
        lengths = jnp.full(len(v) * images, length)
    sizes = {"images": images, "tokens": v.shape[2], "words": length}
    run = partial(pallas_tpu.block_attention, **sizes, interpret=implementation != "pallas")
    out = pallas_tpu.shard_map_kernel(run, *given, words, lengths)
    out = pallas_tpu.with_row_major_layout(out) if implementation == "pallas" else out
    return out.transpose(0, 3, 1, 2).reshape(v.shape)


def choose_implementation(name: str, platform: str, dtype: str, tokens: int, head: int) -> str:
    """The implementation that `config.model.attention` means on a platform (cpu, gpu, tpu) for blocks of `tokens` tokens.

    Raises:
      ConfigError: it needs another platform, or heads of another size.
    """
    if name == "cudnn" and platform != "gpu":
        raise ConfigError(f"config.model.attention='cudnn' needs an NVIDIA GPU; this is a {platform}: 'auto' fits it.")
    if name == "cudnn" and not (cudnn.supports_head_size(head) and dtype == "bfloat16"):
        raise ConfigError(
            f"config.model.attention='cudnn' needs heads of a multiple of 8 values, at most {cudnn.MAX_HEAD_SIZE}, in bfloat16; "
            f"these have {head} in {dtype}: 'auto' fits them."
        )
    if name == "pallas" and platform == "tpu" and not pallas_tpu.tile_size(tokens):
        raise ConfigError(
            f"config.model.attention='pallas' needs blocks of a multiple of {pallas_tpu.LANES} tokens; these have {tokens}: 'auto' "
            "fits them."
        )
    if name == "pallas" and platform != "tpu":
        return "pallas_interpret"  # slow: the kernel's steps one by one
    if name != "auto":
        return name
    if platform == "gpu" and dtype == "bfloat16" and cudnn.supports_head_size(head):
        return "cudnn"
    return "pallas" if platform == "tpu" and pallas_tpu.tile_size(tokens) else "blocks"


def unet_implementation(implementation: str, heads: Sequence[int]) -> str:
    """What the U-Net's attention runs, given the sizes of its heads in all stages."""
    fits = implementation in _PALLAS_IMPLEMENTATIONS or (
        implementation == "cudnn" and all(map(cudnn.supports_head_size, heads))
    )
    return implementation if fits else "blocks"
