"""Skip-causal attention on NVIDIA GPUs with cuDNN's flash attention (section 3.2).

The visible pairs of blocks are a diagonal and the tiles of `attention.tiling` below it. Each layer
runs log2(L) + 1 calls of cuDNN without a causal mask. cuDNN returns the log-sum-exp (`lse`) of each
partial result, by which the results are merged. The backward pass gives each call the merged output
and lse, as ring attention does, so that nothing is computed twice.

Shapes use the letters of `attention.base`; n streams.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from jaxtyping import Float, Int, PyTree

from madformer_jax.ops.attention.base import (
    KV,
    QKV,
    Attention,
    Block,
    checkpoint_residual,
    flatten_blocks,
    require_query,
    select_layer,
)
from madformer_jax.ops.attention.qk_norm_rope import apply_to_tree
from madformer_jax.ops.attention.tiling import tiling

KeyValuePair = tuple[Array, Array]  # keys and values
Partial = tuple[Float[Array, "*rows H h"], Float[Array, "*rows H"]]  # output and lse
Stream = tuple[Array, Array, Array]  # queries, keys and values
_Residuals = tuple[
    tuple[Stream, ...], KeyValuePair | None, KeyValuePair | None, Array | None, tuple[Array, ...], tuple[Array, ...]
]
MAX_HEAD_SIZE = 128


def supports_head_size(head: int) -> bool:
    """Returns whether cuDNN supports this head size on every GPU that has bfloat16."""
    return head % 8 == 0 and head <= MAX_HEAD_SIZE


class PrivateFunctions(NamedTuple):
    """Private functions of JAX that call cuDNN, since `jax.nn` rounds the lse and drops its gradient."""

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., Sequence[Array]]
    mask_types: Any  # an enumeration
    layout: int


def private_functions() -> PrivateFunctions:
    """Returns the private functions of this JAX. No other function names them."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    backward = module._dot_product_attention_bwd_p_wrapper.bind
    return PrivateFunctions(module.dot_product_attention, backward, module.MaskType, module.AttentionLayout.BTNH.value)


@functools.cache
def is_available() -> bool:
    """Returns whether this JAX has the private functions that this module calls. Warns once if not."""
    x, lse = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 1), jnp.float32)
    try:
        inspect.signature(private_functions().forward).bind(x, x, x, **_forward_settings(x, None))
        jax.eval_shape(lambda x, lse: flash_attention_backward(x, x, x, None, x, lse, x), x, lse)
    except Exception as error:
        logging.warning(
            "attention runs without cuDNN, slower: JAX %s has other private functions (%s: %s)",
            jax.__version__, type(error).__name__, error,
        )  # fmt: skip
        return False
    return True


def flash_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B K H h"],
    v: Float[Array, "B K H h"],
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B S H h"], Float[Array, "B S H"]]:
    """Computes softmax(q k^T / sqrt(h)) v and the log-sum-exp of the scores.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      lengths: Number of leading keys that each image attends to. None for all.

    Returns:
      The output, and the lse in float32.
    """
    out, lse = private_functions().forward(q, k, v, **_forward_settings(q, lengths))
    return out, lse.swapaxes(1, 2)


def flash_attention_backward(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B K H h"],
    v: Float[Array, "B K H h"],
    lengths: Int[Array, " B"] | None,
    out: Float[Array, "B S H h"],
    lse: Float[Array, "B S H"],
    gradient: Float[Array, "B S H h"],
) -> tuple[Float[Array, "B S H h"], Float[Array, "B K H h"], Float[Array, "B K H h"]]:
    """Computes the gradients of q, k and v.

    `out` and `lse` have the form of `flash_attention`. They may belong to more keys than `k` holds.
    """
    unused, functions = jnp.zeros(0, q.dtype), private_functions()
    q_lengths, mask_type = _padding_mask(q, lengths)
    sequence_lengths = (unused, unused) if lengths is None else (q_lengths, lengths)
    gradients = functions.backward(
        q, k, v, unused, *sequence_lengths, unused, unused, unused, unused,
        lse.swapaxes(1, 2), out, gradient,
        scale=_softmax_scale(q), seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=mask_type,
        layout=functions.layout, sliding_window_length=None,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


def _forward_settings(q: Array | jax.ShapeDtypeStruct, lengths: Int[Array, " B"] | None) -> dict[str, Any]:
    q_lengths, mask_type = _padding_mask(q, lengths)
    return {
        "q_seqlen": q_lengths, "kv_seqlen": lengths, "scale": _softmax_scale(q), "mask_type": mask_type,
        "return_residual": True,
    }  # fmt: skip


def _padding_mask(
    q: Array | jax.ShapeDtypeStruct, lengths: Int[Array, " B"] | None
) -> tuple[Int[Array, " B"] | None, Any]:
    """Returns cuDNN's query lengths and mask type for keys of these lengths."""
    mask_types = private_functions().mask_types
    if lengths is None:
        return None, mask_types.NO_MASK
    return jnp.full(q.shape[0], q.shape[1], jnp.int32), mask_types.PADDING


def _softmax_scale(q: Array | jax.ShapeDtypeStruct) -> float:
    return float(q.shape[-1]) ** -0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def block_attention(
    streams: tuple[Stream, ...],
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Int[Array, " B"] | None,
    context_stream: int | None,
) -> tuple[Float[Array, "B _ s H h"], ...]:
    """Computes attention of every block to the text, the context blocks before it and itself.

    Args:
      streams: Queries, keys and values of each stream, each `(B, L, s, H, h)`. A stream attends to its
        own. Streams may have different L.
      context: Keys and values, each `(B, L, s, H, h)`, if they are not those of a stream.
      text: Keys and values, each `(B, T, H, h)`, or None.
      lengths: Number of text tokens without padding. None for all.
      context_stream: Index of the stream that is the context. None if there is no context, or another.

    Returns:
      The output of each stream, shaped like its queries.
    """
    return _forward(streams, context, text, lengths, context_stream)[0]


def _stack_streams(arrays: Sequence[Float[Array, "B _ s *rest"]]) -> Float[Array, "B L n s *rest"]:
    """Stacks the arrays of the streams, so that one call serves all. Shorter ones are padded with zeros.

    The barrier lets the tiles be slices of the stack. XLA would compute QK-norm and RoPE again for them.
    """
    blocks = max(x.shape[1] for x in arrays)
    return jax.lax.optimization_barrier(jnp.stack([_pad_blocks(x, blocks) for x in arrays], axis=2))


def _pad_blocks(x: Float[Array, "B _ s *rest"], blocks: int) -> Float[Array, "B {blocks} s *rest"]:
    return jnp.pad(x, [(0, 0), (0, blocks - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _context_keys(
    stacked: KeyValuePair, context: KeyValuePair | None, context_stream: int | None
) -> KeyValuePair | None:
    """Returns the context's keys and values with as many blocks as the stacked ones of the streams."""
    if context_stream is not None:
        return stacked[0][:, :, context_stream], stacked[1][:, :, context_stream]
    return context and (_pad_blocks(context[0], stacked[0].shape[1]), _pad_blocks(context[1], stacked[0].shape[1]))


def _diagonal_keys(
    self_kv: KeyValuePair, text: KeyValuePair | None, lengths: Int[Array, " B"] | None
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


def _forward(
    streams: tuple[Stream, ...],
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Int[Array, " B"] | None,
    context_stream: int | None,
) -> tuple[tuple[Float[Array, "B _ s H h"], ...], _Residuals]:
    q, *self_kv = (_stack_streams(arrays) for arrays in zip(*streams, strict=True))
    batch, blocks, count, tokens, *heads = q.shape
    in_block = q.reshape(batch, blocks, count * tokens, *heads)
    k, v, kv_lengths = _diagonal_keys((self_kv[0], self_kv[1]), text, lengths)
    out, lse = flash_attention(q.reshape(-1, tokens, *heads), k, v, kv_lengths)
    partials = [(out.reshape(in_block.shape), lse.reshape(in_block.shape[:-1]))]
    keys_values = _context_keys((self_kv[0], self_kv[1]), context, context_stream)
    if keys_values is not None:
        for tile in tiling(blocks):
            out, lse = flash_attention(tile.queries(in_block), *map(tile.keys, keys_values))
            partials.append((tile.put_queries(out, in_block), tile.put_queries(lse, in_block[..., 0], -np.inf)))
    merged = []
    for n, (x, *_) in enumerate(streams):
        count = x.shape[1]
        parts = [(out.reshape(q.shape)[:, :count, n], lse.reshape(q.shape[:-1])[:, :count, n]) for out, lse in partials]
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
    q, *self_kv = (_stack_streams(arrays) for arrays in zip(*streams, strict=True))
    tokens, heads, blocks = q.shape[3], q.shape[4:], [x.shape[1] for x, *_ in streams]
    in_block = q.reshape(*q.shape[:2], -1, *heads)
    out, d_out = (_stack_streams(x).reshape(in_block.shape) for x in (outputs, gradients))
    lse = _stack_streams(lses).reshape(in_block.shape[:-1])
    k, v, kv_lengths = _diagonal_keys((self_kv[0], self_kv[1]), text, lengths)
    by_stream = (x.reshape(-1, tokens, *x.shape[3:]) for x in (out, lse, d_out))
    dq, *d_keys = flash_attention_backward(q.reshape(-1, tokens, *heads), k, v, kv_lengths, *by_stream)
    d_keys = [x.reshape(*q.shape[:3], -1, *heads) for x in d_keys]

    # Summands of the gradients of the queries, keys and values of each stream.
    diagonals = (dq.reshape(q.shape), *(x[:, :, :, :tokens] for x in d_keys))
    addends = [[[x[:, :count, n]] for x in diagonals] for n, count in enumerate(blocks)]
    d_text = None
    if text is not None:
        sums = (x[:, :, :, tokens:].sum(axis=(1, 2), dtype=jnp.float32) for x in d_keys)
        d_text = tuple(x.astype(q.dtype) for x in sums)
    d_context: tuple[list[Array], list[Array]] = ([], [])  # of the keys and of the values
    keys_values = _context_keys((self_kv[0], self_kv[1]), context, context_stream)
    if keys_values is not None:
        for tile in tiling(q.shape[1]):
            k, v = map(tile.keys, keys_values)
            rows = (tile.queries(x) for x in (out, lse, d_out))
            dq, *d_keys = flash_attention_backward(tile.queries(in_block), k, v, None, *rows)
            dq = tile.put_queries(dq, in_block).reshape(q.shape)
            for n, count in enumerate(blocks):
                addends[n][0].append(dq[:, :count, n])
            for column, x in zip(d_context, d_keys, strict=True):
                column.append(tile.put_keys(x, keys_values[0]))
    if context_stream is not None:
        for terms, column in zip(addends[context_stream][1:], d_context, strict=True):
            terms += [x[:, : blocks[context_stream]] for x in column]
    d_streams = tuple(tuple(map(_sum_in_float32, column)) for column in addends)
    if context is None:
        return d_streams, None, d_text, None
    zeros = [jnp.zeros_like(keys_values[0])] if keys_values is not None else []
    count = context[0].shape[1]
    return d_streams, tuple(_sum_in_float32(column or zeros)[:, :count] for column in d_context), d_text, None


def _sum_in_float32(arrays: list[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    return sum((x.astype(jnp.float32) for x in arrays[1:]), arrays[0].astype(jnp.float32)).astype(arrays[0].dtype)


block_attention.defvjp(_forward, _backward)


def cached_attention(
    q: Float[Array, "B s H h"],
    self_kv: KeyValuePair,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    block: int | Int[Array, ""],
    lengths: Int[Array, " B"] | None,
) -> Float[Array, "B s H h"]:
    """Computes attention of one block against the cache, in sampling.

    Args:
      q: Queries of the block.
      self_kv: Keys and values of the block, each `(B, s, H, h)`.
      context: Cached keys and values, each `(B, slots, s, H, h)`, or None. Slots from `block` on are
        ignored but must be finite.
      text: Keys and values, each `(B, T, H, h)`, or None.
      block: Number of filled slots.
      lengths: Number of text tokens without padding. None for all.
    """
    k, v, kv_lengths = _diagonal_keys(tuple(x[:, None, None] for x in self_kv), text, lengths)  # type: ignore[arg-type]
    diagonal = flash_attention(q, k, v, kv_lengths)
    if context is None or (isinstance(block, int) and block == 0):
        return diagonal[0]
    k, v = map(flatten_blocks, context)
    filled = jnp.full(q.shape[0], jnp.maximum(block, 1) * q.shape[1], jnp.int32)
    out, lse = flash_attention(q, k, v, filled)
    return merge_partials([diagonal, (out, jnp.where(jnp.asarray(block) > 0, lse, -jnp.inf))])[0]


class CudnnAttention(Attention):
    """Attention with cuDNN, on GPUs. Cached keys and values are `(layers, B, slots, s, H, h)`."""

    name = "cudnn"
    requirements = (
        f"an NVIDIA GPU, bfloat16, a head size that is a multiple of 8 and at most {MAX_HEAD_SIZE}, and a JAX whose "
        "cuDNN functions are known"
    )
    cache_token_axes = 2, 2
    layers_apart = True

    def supports(self, device: str, dtype: str, head_dim: int, tokens: int) -> bool:
        return device == "gpu" and dtype == "bfloat16" and supports_head_size(head_dim) and is_available()

    def block_attention(
        self,
        streams: Sequence[QKV],
        context: KV | None,
        text: KV | None,
        lengths: Int[Array, " images"] | None = None,
        *,
        images: int = 1,
    ) -> list[Float[Array, "B _ s H h"]]:
        own = (n for n, stream in enumerate(streams) if context is not None and stream.v is context.v)
        context_stream = next(own, None)
        streams, context = apply_to_tree((streams, context if context_stream is None else None), store_norms=True)
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
        self,
        qkv: QKV,
        context: KV | None,
        text: KV | None,
        layer: int | Int[Array, ""],
        block: int | Int[Array, ""],
        lengths: Int[Array, " B"] | None = None,
    ) -> Block:
        q, k, v = (x[:, 0] for x in require_query(qkv))
        context, text = (kv and select_layer(kv, layer) for kv in (context, text))
        return cached_attention(q, (k, v), context, text, block, lengths)[:, None]

    def to_cache_layout(self, kv: KV) -> KV:
        return kv

    def attend(
        self, q: Float[Array, "B S H h"], k: Float[Array, "B K H h"], v: Float[Array, "B K H h"]
    ) -> Float[Array, "B S H h"]:
        if k.shape[1] == 1 or not supports_head_size(q.shape[-1]):
            return super().attend(q, k, v)
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
