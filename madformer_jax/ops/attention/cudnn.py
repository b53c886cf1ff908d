"""Skip-causal attention on NVIDIA GPUs with cuDNN's flash attention (section 3.2).

The visible pairs of blocks are a diagonal and the tiles of `attention.tiling` below it. Each layer
runs one call of cuDNN for the diagonal and one for each tile, without a causal mask. These are log2(L)
+ 1 calls if L is a power of two. cuDNN returns the log-sum-exp (`lse`) of each
partial result, by which the results are merged. The backward pass gives each call the merged output
and lse, as ring attention does, so that nothing is computed twice.

Shapes use the letters of `attention.base`; n streams.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from madformer_jax.ops.attention import cudnn_calls
from madformer_jax.ops.attention.base import (
    KV,
    QKV,
    Attention,
    Block,
    Index,
    Lengths,
    checkpoint_residual,
    require_query,
    select_layer,
)
from madformer_jax.ops.attention.cudnn_stacks import (
    pad_blocks,
    projection_gradient,
    stack_projections,
    stack_streams,
    sum_in_float32,
    unstack,
)
from madformer_jax.ops.attention.cudnn_tiles import descending_tiles
from madformer_jax.ops.attention.qk_norm_rope import Projectable, apply_to_tree

ArrayPair = tuple[Array, Array]  # keys and values
Partial = tuple[Float[Array, "*rows H h"], Float[Array, "*rows H"]]  # output and lse
Stream = tuple[Projectable, Projectable, Array]  # queries, keys and values
_Residuals = tuple[
    tuple[Stream, ...], ArrayPair | None, ArrayPair | None, Array | None, tuple[Array, ...], tuple[Array, ...]
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def block_attention(
    streams: tuple[Stream, ...],
    context: ArrayPair | None,
    text: ArrayPair | None,
    lengths: Int[Array, " B"] | None,
    context_stream: int | None,
) -> tuple[Float[Array, "B _ s H h"], ...]:
    """Computes attention of every block to the text, the context blocks before it and itself.

    Args:
      streams: Queries and keys, each an array or a `ProjectedQK`, and values of each stream,
        `(B, L, s, H, h)`. A stream attends to its own. Streams may have different L.
      context: Keys and values, each `(B, L, s, H, h)`, if they are not those of a stream.
      text: Keys and values, each `(B, T, H, h)`, or None.
      lengths: Number of text tokens without padding. None for all.
      context_stream: Index of the stream that is the context. None without a context, or if it is not a stream.

    Returns:
      The output of each stream, shaped like its queries.
    """
    return _forward(streams, context, text, lengths, context_stream)[0]


def _context_keys(stacked: ArrayPair, context: ArrayPair | None, context_stream: int | None) -> ArrayPair | None:
    """Returns the context's keys and values, with as many blocks as the stacked ones and in their order."""
    if context_stream is not None:
        return stacked[0][:, :, context_stream], stacked[1][:, :, context_stream]
    if context is None:
        return None
    k, v = (pad_blocks(x, stacked[0].shape[1])[:, ::-1] for x in context)
    return k, v


def _diagonal_keys(
    self_kv: ArrayPair, text: ArrayPair | None, lengths: Int[Array, " B"] | None
) -> tuple[Float[Array, "rows keys H h"], Float[Array, "rows keys H h"], Int[Array, " rows"] | None]:
    """Joins the keys and values of each block with those of the text.

    Returns:
      Keys and values of rows = B * L * n blocks, and the number of them that are not padding, or
      None for all.
    """
    batch, blocks, streams, tokens, heads, size = self_kv[0].shape
    keys_values = list(self_kv)
    if text is not None:
        shape = (batch, blocks, streams, text[0].shape[1], heads, size)
        repeated = [jnp.broadcast_to(x[:, None, None], shape) for x in text]
        keys_values = [jnp.concatenate(x, axis=3) for x in zip(self_kv, repeated, strict=True)]
    kv_lengths = None
    if text is not None and lengths is not None:
        kv_lengths = jnp.repeat(tokens + lengths, blocks * streams).astype(jnp.int32)
    k, v = (x.reshape(-1, *x.shape[3:]) for x in keys_values)
    return k, v, kv_lengths


def _stack_qkv(streams: tuple[Stream, ...]) -> tuple[Array, ArrayPair]:
    """Returns the stacked queries, and keys and values, of the streams, each `(B, L, n, s, H, h)`."""
    queries, keys, values = zip(*streams, strict=True)
    return stack_projections(queries), (stack_projections(keys), stack_streams(values))


def _forward(
    streams: tuple[Stream, ...],
    context: ArrayPair | None,
    text: ArrayPair | None,
    lengths: Int[Array, " B"] | None,
    context_stream: int | None,
) -> tuple[tuple[Float[Array, "B _ s H h"], ...], _Residuals]:
    q, self_kv = _stack_qkv(streams)
    batch, blocks, count, tokens, *heads = q.shape
    in_block = q.reshape(batch, blocks, count * tokens, *heads)
    k, v, kv_lengths = _diagonal_keys(self_kv, text, lengths)
    out, lse = cudnn_calls.flash_attention(q.reshape(-1, tokens, *heads), k, v, kv_lengths)
    partials = [(out.reshape(in_block.shape), lse.reshape(in_block.shape[:-1]))]
    keys_values = _context_keys(self_kv, context, context_stream)
    if keys_values is not None:
        for tile in descending_tiles(blocks):
            k, v = map(tile.keys, keys_values)
            out, lse = cudnn_calls.flash_attention(tile.queries(in_block), k, v, queries=tile.query_count(in_block))
            partials.append((tile.put_queries(out, in_block), tile.put_queries(lse, in_block[..., 0], -np.inf)))
    merged = []
    for n, (*_, v) in enumerate(streams):
        count = v.shape[1]
        parts = [
            (unstack(out.reshape(q.shape), n, count), unstack(lse.reshape(q.shape[:-1]), n, count))
            for out, lse in partials
        ]
        merged.append(tuple(map(checkpoint_residual, merge_partials(parts))))
    outputs, lses = zip(*merged, strict=True)
    return outputs, (streams, context, text, lengths, outputs, lses)


def merge_partials(partials: list[Partial]) -> Partial:
    """Merges results of `flash_attention` on disjoint keys into the result on all keys.

    A partial result without keys has an lse of -inf.
    """
    maximum = jnp.stack([lse for _, lse in partials]).max(axis=0)
    merged = maximum + jnp.log(sum(jnp.exp(lse - maximum) for _, lse in partials))
    out = sum(out.astype(jnp.float32) * jnp.exp(lse - merged)[..., None] for out, lse in partials)
    return jnp.asarray(out, partials[0][0].dtype), merged


def _backward(
    context_stream: int | None, saved: _Residuals, gradients: tuple[Float[Array, "B _ s H h"], ...]
) -> tuple[PyTree[Array], ...]:
    streams, context, text, lengths, outputs, lses = saved
    q, self_kv = _stack_qkv(streams)
    tokens, heads, blocks = q.shape[3], q.shape[4:], [v.shape[1] for *_, v in streams]
    in_block = q.reshape(*q.shape[:2], -1, *heads)
    out, d_out = (stack_streams(x).reshape(in_block.shape) for x in (outputs, gradients))
    lse = stack_streams(lses).reshape(in_block.shape[:-1])
    k, v, kv_lengths = _diagonal_keys(self_kv, text, lengths)
    by_stream = (x.reshape(-1, tokens, *x.shape[3:]) for x in (out, lse, d_out))
    dq, *d_keys = cudnn_calls.flash_attention_backward(q.reshape(-1, tokens, *heads), k, v, kv_lengths, *by_stream)
    d_keys = [x.reshape(*q.shape[:3], -1, *heads) for x in d_keys]

    diagonals = (dq.reshape(q.shape), *(x[:, :, :, :tokens] for x in d_keys))
    # What is added to the gradients of the queries, keys and values of each stream.
    terms: list[list[list[Array]]] = [[[], [], []] for _ in blocks]
    d_text = None
    if text is not None:
        sums = (x[:, :, :, tokens:].sum(axis=(1, 2), dtype=jnp.float32) for x in d_keys)
        d_text = tuple(x.astype(q.dtype) for x in sums)
    d_context: tuple[list[Array], list[Array]] = ([], [])  # of the keys and of the values
    keys_values = _context_keys(self_kv, context, context_stream)
    if keys_values is not None:
        for tile in descending_tiles(q.shape[1]):
            k, v = map(tile.keys, keys_values)
            rows = (tile.queries(x) for x in (out, lse, d_out))
            dq, *d_keys = cudnn_calls.flash_attention_backward(
                tile.queries(in_block), k, v, None, *rows, queries=tile.query_count(in_block)
            )
            dq = tile.put_queries(dq, in_block).reshape(q.shape)
            for n, count in enumerate(blocks):
                terms[n][0].append(unstack(dq, n, count))
            for column, x in zip(d_context, d_keys, strict=True):
                column.append(tile.put_keys(x, keys_values[0]))
    if context_stream is not None:
        for addends, column in zip(terms[context_stream][1:], d_context, strict=True):
            addends += [x[:, ::-1][:, : blocks[context_stream]] for x in column]
    d_streams = tuple(
        tuple(projection_gradient(x, d, n, added) for x, d, added in zip(stream, diagonals, terms[n], strict=True))
        for n, stream in enumerate(streams)
    )
    if context is None:
        return d_streams, None, d_text, None
    zeros = [jnp.zeros_like(keys_values[0])] if keys_values is not None else []
    count = context[0].shape[1]
    return d_streams, tuple(sum_in_float32(column or zeros)[:, ::-1][:, :count] for column in d_context), d_text, None


block_attention.defvjp(_forward, _backward)


class CudnnAttention(Attention):
    """Attention with cuDNN, on GPUs. Cached keys and values are `(layers, B, tokens, H, h)`."""

    name = "cudnn"
    requirements = (
        f"an NVIDIA GPU, bfloat16, a head size that is a multiple of 8 and at most {cudnn_calls.MAX_HEAD_SIZE}, and a JAX whose "
        "cuDNN functions are known"
    )
    cache_token_axes = 2, 2
    unrolls_layers = True
    adds_bias = True
    kernel_platform = "gpu"

    def supports(self, device: str, dtype: str, head_dim: int, tokens: int) -> bool:
        return (
            device == "gpu"
            and dtype == "bfloat16"
            and cudnn_calls.supports_head_size(head_dim)
            and cudnn_calls.is_available()
        )

    def block_attention(
        self, streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Lengths = None, *, images: int = 1
    ) -> list[Float[Array, "B _ s H h"]]:
        matching = (n for n, stream in enumerate(streams) if context is not None and stream.v is context.v)
        context_stream = next(matching, None)
        context = apply_to_tree(context if context_stream is None else None, store_norms=True)
        return list(
            block_attention(
                tuple(map(require_query, streams)),
                None if context is None else (context.k, context.v),
                None if text is None else (text.k, text.v),
                lengths,
                context_stream,
            )
        )

    def cached_attention(
        self, qkv: QKV, context: KV | None, text: KV | None, layer: Index, block: Index, lengths: Lengths = None
    ) -> Block:
        context, text = (kv and select_layer(kv, layer) for kv in (context, text))
        if context is not None:
            room = sum(x.v.shape[-3] for x in (qkv, text) if x is not None)
            context = KV(*(jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in context))
            return self.write_and_attend(qkv, context, text, block, lengths)[0]
        q, k, v = require_query(qkv)
        k, v, kv_lengths = _diagonal_keys((k[:, None], v[:, None]), text, lengths)
        return cudnn_calls.flash_attention(q[:, 0], k, v, kv_lengths)[0][:, None]

    def write_and_attend(
        self, qkv: QKV, context: KV, text: KV | None, block: Index, lengths: Lengths = None
    ) -> tuple[Block, KV]:
        q, k, v = (x[:, 0] for x in require_query(qkv))
        start = block * q.shape[1]
        # The text follows the block, as cuDNN hides the end of the keys only. The next block replaces it.
        keys_values = (k, v) if text is None else (jnp.concatenate(x, axis=1) for x in zip((k, v), text, strict=True))
        context = KV(
            *(
                jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=1)
                for x, y in zip(context, keys_values, strict=True)
            )
        )
        text_tokens = 0 if text is None else text.k.shape[1] if lengths is None else lengths
        kv_lengths = jnp.broadcast_to(start + q.shape[1] + text_tokens, len(q)).astype(jnp.int32)
        return cudnn_calls.flash_attention(q, *context, kv_lengths)[0][:, None], context

    def to_cache_layout(self, kv: KV) -> KV:
        return KV(*(x.reshape(*x.shape[:2], -1, *x.shape[-2:]) for x in kv))

    def attend(
        self, q: Float[Array, "B S H h"], k: Float[Array, "B K H h"], v: Float[Array, "B K H h"]
    ) -> Float[Array, "B S H h"]:
        if k.shape[1] == 1 or not cudnn_calls.supports_head_size(q.shape[-1]):
            return super().attend(q, k, v)
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
