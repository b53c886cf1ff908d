"""Skip-causal attention with a dense mask over all keys, (L s)^2 scores, to test the other implementations."""

import jax
import jax.numpy as jnp

from madformer_jax.ops.attention.base import KV, QKV, Blocks, Lengths, flatten_blocks, require_query
from madformer_jax.ops.attention.xla_blocks import XlaBlocks


class DenseMask(XlaBlocks):
    """Attention with a dense mask. In sampling it is `XlaBlocks`."""

    name = "reference"

    def stream_attention(self, stream: QKV, context: KV | None, text: KV | None, lengths: Lengths) -> Blocks:
        q, k, v = map(flatten_blocks, require_query(stream))
        block = jnp.arange(q.shape[1]) // stream.v.shape[2]  # of each query
        sources = [(KV(k, v), block[:, None] == block)]
        if context is not None:
            context = KV(*map(flatten_blocks, context))
            sources.append((context, block[:, None] > jnp.arange(context.k.shape[1]) // stream.v.shape[2]))
        if text is not None:
            visible = jnp.arange(text.k.shape[1]) < (text.k.shape[1] if lengths is None else lengths[:, None])
            sources.insert(0, (text, jnp.atleast_2d(visible)[:, None]))
        kvs, masks = zip(*sources, strict=True)
        k, v = (jnp.concatenate(x, axis=1) for x in zip(*kvs, strict=True))
        mask = jnp.concatenate([jnp.broadcast_to(x, (len(q), q.shape[1], x.shape[-1])) for x in masks], axis=2)
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]).reshape(stream.v.shape)
