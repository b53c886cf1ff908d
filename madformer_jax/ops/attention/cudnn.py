"""Skip-causal attention on NVIDIA GPUs: log2(L) + 1 of cuDNN's flash attentions a layer, none with a mask.

What the blocks see is a diagonal and a triangle below it, which falls apart into squares (`squares`). cuDNN gives each part with
the logarithms of its sums of weights, by which the parts are joined; for the gradient each part is given the joined result,
as ring attention does it, so that nothing is computed twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn rounds the logarithms, and drops their gradient

from madformer_jax.ops.attention.tiling import tiling

KeyValuePair = tuple[Array, Array]  # keys and values
MAX_HEAD_SIZE = 128  # values of a head


def supports_head_size(head: int) -> bool:
    """Whether cuDNN's flash attention takes heads of so many values, on every GPU that has bfloat16."""
    return head % 8 == 0 and head <= MAX_HEAD_SIZE


def flash_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(h)) v of q (B, S, H, h) on the first `lengths` (B,) of k and v (B, K, H, h), and its log-sums of weights.

    Returns:
      (B, S, H, h) and float32 (B, S, H).
    """
    rows, masked = _padding_mask(q, lengths)
    out, logs = cudnn.dot_product_attention(
        q, k, v, q_seqlen=rows, kv_seqlen=lengths, scale=_softmax_scale(q), mask_type=masked, return_residual=True
    )
    return out, logs.swapaxes(1, 2)


def flash_attention_backward(
    q: Array, k: Array, v: Array, lengths: Array | None, out: Array, logs: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, which may be a part of the keys that `out` and `logs`, like those of `flash`, belong to."""
    unused = jnp.zeros(0, q.dtype)
    rows, masked = _padding_mask(q, lengths)
    ends = (unused, unused) if lengths is None else (rows, lengths)
    found: Any = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, unused, *ends, unused, unused, unused, unused,
        logs.swapaxes(1, 2), out, gradient,
        scale=_softmax_scale(q), seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=masked,
        layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=None,
    )  # fmt: skip
    return found[0], found[1], found[2]


def _padding_mask(q: Array, lengths: Array | None) -> tuple[Array | None, cudnn.MaskType]:
    """How many queries there are, (B,), where the keys end somewhere, and what cuDNN calls that."""
    if lengths is None:
        return None, cudnn.MaskType.NO_MASK
    return jnp.full(q.shape[0], q.shape[1], jnp.int32), cudnn.MaskType.PADDING


def _softmax_scale(q: Array) -> float:
    return float(q.shape[-1]) ** -0.5


@jax.custom_vjp
def block_attention(
    q: Array, own: KeyValuePair, context: KeyValuePair | None, text: KeyValuePair | None, lengths: Array | None
) -> Array:
    """Every block sees the text, the context blocks before it, and its own keys.

    Args:
      q: (B, blocks, n, s, H, h), of n streams.
      own: keys and values of the same shape; a stream sees its own.
      context: (B, blocks, s, H, h), or None.
      text: (B, T, H, h), of which the first `lengths` (B,) are seen, by default all; or None.

    Returns:
      An array like q.
    """
    return _forward(q, own, context, text, lengths)[0]


def _diagonal_keys(
    own: KeyValuePair, text: KeyValuePair | None, lengths: Array | None
) -> tuple[Array, Array, Array | None]:
    """What the parts of the diagonal see, (B blocks n, s + T, H, h) twice, and how much of it (B blocks n,)."""
    batch, blocks, streams, tokens, heads, size = own[0].shape
    keys = list(own)
    if text is not None:
        shape = (batch, blocks, streams, text[0].shape[1], heads, size)
        words = [jnp.broadcast_to(x[:, None, None], shape) for x in text]
        keys = [jnp.concatenate(x, axis=3) for x in zip(own, words, strict=True)]
    seen = None if text is None or lengths is None else jnp.repeat(tokens + lengths, blocks * streams).astype(jnp.int32)
    k, v = (x.reshape(-1, *x.shape[3:]) for x in keys)
    return k, v, seen


def _forward(
    q: Array, own: KeyValuePair, context: KeyValuePair | None, text: KeyValuePair | None, lengths: Array | None
) -> Any:
    batch, blocks, streams, tokens, *heads = q.shape
    in_block = q.reshape(batch, blocks, streams * tokens, *heads)
    k, v, seen = _diagonal_keys(own, text, lengths)
    parts = [flash_attention(q.reshape(-1, tokens, *heads), k, v, seen)]
    parts = [(out.reshape(in_block.shape), logs.reshape(in_block.shape[:-1])) for out, logs in parts]
    if context is not None:
        for square in tiling(blocks):
            out, logs = flash_attention(square.queries(in_block), square.keys(context[0]), square.keys(context[1]))
            parts.append((square.put_queries(out, in_block), square.put_queries(logs, in_block[..., 0], -np.inf)))
    out, logs = merge_partials(parts)
    return out.reshape(q.shape), (q, own, context, text, lengths, out, logs)


def merge_partials(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The attention to all parts' keys, of results like those of `flash`; a part that sees nothing has logarithms of -inf."""
    top = jnp.stack([logs for _, logs in parts]).max(axis=0)
    logs = top + jnp.log(sum(jnp.exp(logs - top) for _, logs in parts))
    out = sum(out.astype(jnp.float32) * jnp.exp(part - logs)[..., None] for out, part in parts)
    return jnp.asarray(out, parts[0][0].dtype), logs


def _backward(saved: Any, gradient: Array) -> Any:
    q, own, context, text, lengths, out, logs = saved
    tokens, heads = q.shape[3], q.shape[4:]
    in_block, d_out = q.reshape(out.shape), gradient.reshape(out.shape)
    k, v, seen = _diagonal_keys(own, text, lengths)
    by_stream = (x.reshape(-1, tokens, *x.shape[3:]) for x in (out, logs, d_out))
    dq, *d_keys = flash_attention_backward(q.reshape(-1, tokens, *heads), k, v, seen, *by_stream)
    dqs = [dq.reshape(out.shape)]
    d_keys = [x.reshape(*q.shape[:3], -1, *heads) for x in d_keys]
    d_own = tuple(x[:, :, :, :tokens] for x in d_keys)
    d_text = None
    if text is not None:
        words = (x[:, :, :, tokens:].sum(axis=(1, 2), dtype=jnp.float32) for x in d_keys)
        d_text = tuple(x.astype(q.dtype) for x in words)
    d_context = None
    if context is not None:
        found: tuple[list[Array], list[Array]] = ([], [])
        for square in tiling(q.shape[1]):
            k, v = (square.keys(x) for x in context)
            rows = (square.queries(x) for x in (out, logs, d_out))
            dq, *d_keys = flash_attention_backward(square.queries(in_block), k, v, None, *rows)
            dqs.append(square.put_queries(dq, in_block))
            for column, x in zip(found, d_keys, strict=True):
                column.append(square.put_keys(x, context[0]))
        d_context = tuple(_sum_in_float32(column) if column else jnp.zeros_like(context[0]) for column in found)
    return _sum_in_float32(dqs).reshape(q.shape), d_own, d_context, d_text, None


def _sum_in_float32(parts: list[Array]) -> Array:
    return sum((x.astype(jnp.float32) for x in parts[1:]), parts[0].astype(jnp.float32)).astype(parts[0].dtype)


block_attention.defvjp(_forward, _backward)


def cached_attention(
    q: Array,
    own: KeyValuePair,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    block: int | Array,
    lengths: Array | None,
) -> Array:
    """One block's queries (B, s, H, h), in sampling: what `attend` gives, with the first `block` slots of the context filled.

    Args:
      own: (B, s, H, h) keys and values.
      context: (B, slots, s, H, h), finite where it is not filled, or None.
    """
    k, v, seen = _diagonal_keys(tuple(x[:, None, None] for x in own), text, lengths)  # type: ignore[arg-type]
    part = flash_attention(q, k, v, seen)
    if context is None or (isinstance(block, int) and block == 0):
        return part[0]
    k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in context)
    filled = jnp.full(q.shape[0], jnp.maximum(block, 1) * q.shape[1], jnp.int32)
    out, logs = flash_attention(q, k, v, filled)
    return merge_partials([part, (out, jnp.where(jnp.asarray(block) > 0, logs, -jnp.inf))])[0]
