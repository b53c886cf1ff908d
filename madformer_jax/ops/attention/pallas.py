"""Skip-causal attention on a TPU with Pallas kernels, as an `Attention` (section 3.2).

It converts arrays to the layout of the kernels and splits them over the mesh. `attention.pallas_tpu`
calls the kernels. Shapes use the letters of `attention.base`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from madformer_jax.ops.attention import pallas_tpu
from madformer_jax.ops.attention.base import KV, QKV, Attention, Block, Index, Lengths, require_query
from madformer_jax.ops.attention.qk_norm_rope import Projectable, ProjectedQK, is_projected
from madformer_jax.ops.rope import RotaryTable


@dataclasses.dataclass(frozen=True)
class PallasAttention(Attention):
    """Attention with Pallas kernels.

    Cached keys and values are `(layers, B, H, h, tokens)`, because registers of a TPU have 128 lanes
    and would be half empty with heads of 64 along them.

    Attributes:
      interpret: Whether Pallas' interpreter runs the steps of the kernels one by one. It is slow, but
        runs on any platform and takes blocks of any size.
    """

    interpret: bool = False
    name = "pallas"
    requirements = f"a TPU and blocks of a multiple of {pallas_tpu.LANES} tokens"
    cache_token_axes = 4, 4
    kernel_platform = "tpu"

    def supports(self, device: str, dtype: str, head_dim: int, tokens: int) -> bool:
        return self.interpret or (device == "tpu" and pallas_tpu.tile_size(tokens) is not None)

    def for_device(self, device: str) -> Attention:
        return PallasAttention(interpret=device != "tpu")

    def block_attention(
        self, streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Lengths = None, *, images: int = 1
    ) -> list[Float[Array, "B _ s H h"]]:
        return [self._stream_attention(stream, context, text, lengths, images) for stream in streams]

    def _stream_attention(
        self, stream: QKV, context: KV | None, text: KV | None, lengths: Lengths, images: int
    ) -> Float[Array, "B L s H h"]:
        q, k, v = require_query(stream)
        context_has_self = context is not None and v is context.v  # the stream is its own context

        def tokens_last(x: Projectable) -> Projectable:
            if not is_projected(x):
                return self._to_kernel_layout(x)
            rows, scale = self._to_kernel_layout(x.x), x.scale[:, None]
            return ProjectedQK(rows, scale, RotaryTable(*(y.reshape(-1, y.shape[-1]).T for y in x.position)))

        arrays = (q, None if context_has_self else (k, v), context and tuple(context))
        arrays = jax.tree.map(tokens_last, arrays, is_leaf=is_projected)
        padded = None if text is None else tuple(pallas_tpu.pad_text_to_lanes(tokens_last(x), images) for x in text)
        text_tokens = 0 if text is None else text.k.shape[1] // images
        if text_tokens and lengths is None:
            lengths = jnp.full(len(v) * images, text_tokens)
        sizes = pallas_tpu.KernelSizes(images, v.shape[2], text_tokens, self.interpret)
        kernel = partial(pallas_tpu.block_attention, sizes=sizes)
        out = pallas_tpu.shard_map_kernel(kernel, *arrays, padded, lengths)
        out = out if self.interpret else pallas_tpu.with_row_major_layout(out)
        return out.transpose(0, 3, 1, 2).reshape(v.shape)

    def cached_attention(
        self, qkv: QKV, context: KV | None, text: KV | None, layer: Index, block: Index, lengths: Lengths = None
    ) -> Block:
        block_qkv = [x[:, 0] for x in require_query(qkv)]
        q, k, v = map(self._to_kernel_layout, block_qkv)
        indices = (jnp.asarray(x, jnp.int32) for x in (layer, block))
        kernel = partial(pallas_tpu.cached_attention, interpret=self.interpret)
        out = pallas_tpu.shard_map_kernel(kernel, q, (k, v), context, text, lengths, *indices)
        return out.transpose(0, 3, 1, 2)[:, None]

    def to_cache_layout(self, kv: KV) -> KV:
        rows = (_tokens_last(x, batch_axes=2) for x in kv)
        return KV(*(rows if kv.k.ndim == 6 else (pallas_tpu.pad_text_to_lanes(x, 1) for x in rows)))

    def cache_lengths(self, lengths: Lengths, text: Int[Array, "images T"]) -> Lengths:
        # `to_cache_layout` pads the texts, so every text needs a length.
        return jnp.full(len(text), text.shape[1]) if lengths is None else lengths

    def images_per_row(self, batch: int) -> int:
        return pallas_tpu.images_per_row(batch)

    def with_kernel_layout(self, x: Float[Array, "B S H h"]) -> Float[Array, "B S H h"]:
        return x if self.interpret else jnp.moveaxis(self._to_kernel_layout(x), -1, 1)

    def attend(
        self, q: Float[Array, "B S H h"], k: Float[Array, "B K H h"], v: Float[Array, "B K H h"]
    ) -> Float[Array, "B S H h"]:
        if k.shape[1] == 1 or not (self.interpret or pallas_tpu.tile_size(q.shape[1])):
            return super().attend(q, k, v)
        images = pallas_tpu.images_per_row(len(q))
        rows = QKV(*(x.reshape(len(x) // images, images, *x.shape[1:]) for x in (q, k, v)))
        return self._stream_attention(rows, None, None, None, images).reshape(q.shape)

    def _to_kernel_layout(self, x: Float[Array, "B *tokens H h"]) -> Float[Array, "B H h _"]:
        rows = _tokens_last(x)
        return rows if self.interpret else pallas_tpu.with_row_major_layout(rows)


def _tokens_last(x: Float[Array, "..."], batch_axes: int = 1) -> Float[Array, "..."]:
    """Converts `(B, L, s, H, h)` or `(B, T, H, h)`, with further axes before B, to `(B, H, h, tokens)`."""
    return jnp.moveaxis(x.reshape(*x.shape[:batch_axes], -1, *x.shape[-2:]), -3, -1)
