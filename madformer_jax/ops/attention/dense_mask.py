"""Skip-causal attention with a dense mask over all keys, to test the other implementations.

It computes (L s)^2 scores. In sampling it is `XlaBlocks`. Shapes use the letters of
`attention.base`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from madformer_jax.ops.attention.base import KV, QKV, key_mask, require_query
from madformer_jax.ops.attention.qk_norm_rope import apply_to_tree
from madformer_jax.ops.attention.xla_blocks import XlaBlocks


class DenseMask(XlaBlocks):
    """Attention with a dense mask."""

    name = "reference"

    def block_attention(
        self,
        streams: Sequence[QKV],
        context: KV | None,
        text: KV | None,
        lengths: Int[Array, " images"] | None = None,
        *,
        images: int = 1,
    ) -> list[Float[Array, "B _ s H h"]]:
        streams, context = apply_to_tree((streams, context))
        outputs = []
        for stream in streams:
            q, k, v = require_query(stream)
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
                mask = mask & key_mask(lengths, text.k.shape[1], k.shape[1] - text.k.shape[1])[:, None]
            out = jax.nn.dot_product_attention(q.reshape(batch, -1, *q.shape[3:]), k, v, mask=mask[:, None])
            outputs.append(out.reshape(q.shape))
        return outputs
