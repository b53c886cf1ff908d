"""Skip-causal attention of small blocks as one product with a mask, for a CPU (section 3.2).

All streams attend in one product to all keys. With few tokens the masked scores cost less than the
many small products and copies of the tiles in `xla_blocks`. Shapes use the letters of `attention.base`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from madformer_jax.ops.attention.base import KV, QKV, key_mask, require_query

# Tokens of an image up to which one product is faster (docs/engineering_log.md).
MAX_TOKENS = 128


def joint_attention(
    streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Int[Array, " B"] | None
) -> list[Float[Array, "B _ s H h"]]:
    """Computes what `Attention.block_attention` computes, from queries and keys after QK-norm and RoPE."""
    batch, _, tokens, heads, size = streams[0].v.shape
    qs = [_flatten(require_query(x)[0]) for x in streams]
    sources = [] if context is None else [context]
    sources += [x.kv for x in streams if context is None or x.v is not context.v]
    text_tokens = 0 if text is None else text.k.shape[1]
    ks, vs = ([*([] if text is None else [text[n]]), *(_flatten(x[n]) for x in sources)] for n in range(2))
    q, k, v = (jnp.concatenate(x, axis=1) for x in (qs, ks, vs))
    mask = jnp.asarray(_visible(streams, context, text_tokens))
    if lengths is not None and text is not None:
        mask = mask & key_mask(lengths, text_tokens, k.shape[1] - text_tokens)[:, None, :, None]
    # Keys run down the columns of the scores, as in `base.column_attention`.
    scores = jnp.einsum("bkhd,bqhd->bhkq", k, q * size**-0.5, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-2, keepdims=True)))
    out = jnp.einsum("bkhd,bhkq->bhdq", v, weights.astype(v.dtype), preferred_element_type=jnp.float32)
    out = (out / weights.sum(axis=-2, keepdims=True)).astype(v.dtype).transpose(0, 3, 1, 2)
    parts = jax.lax.split(out, [x.shape[1] for x in qs], axis=1)
    return [x.reshape(batch, -1, tokens, heads, size) for x in parts]


def _flatten(x: Float[Array, "B n s H h"]) -> Float[Array, "B _ H h"]:
    return x.reshape(len(x), -1, *x.shape[3:])


def _visible(streams: Sequence[QKV], context: KV | None, text_tokens: int) -> Bool[np.ndarray, "keys queries"]:
    """Returns which keys (text, context, then each stream that is not the context) a query sees."""
    tokens = streams[0].v.shape[2]

    def blocks(x: QKV | KV) -> np.ndarray:
        return np.repeat(np.arange(x.v.shape[1]), tokens)

    columns = []
    for query in streams:
        is_context = context is not None and query.v is context.v
        i = blocks(query)[None]
        rows = [np.ones((text_tokens, i.size), bool)]
        if context is not None:
            rows.append(blocks(context)[:, None] < i + is_context)
        for source in streams:
            if context is None or source.v is not context.v:
                rows.append((blocks(source)[:, None] == i) & (source is query))
        columns.append(np.concatenate(rows))
    return np.concatenate(columns, axis=1)
