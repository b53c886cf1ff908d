"""Skip-causal attention (MADFormer, section 3.2) in block form: what is masked is never computed.

Every query block i, of either stream, sees the text, the context blocks before i, and itself; the context is the clean
stream, or the prediction stream when there is no clean one. That is the same number of keys for the clean and the
prediction query, all visible, so the whole is one unmasked attention per block with the streams side by side in the batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.config import ConfigError


class KV(NamedTuple):
    """Keys and values, (B, blocks, s, H, h) of an image stream or (B, T, H, h) of the text."""

    k: Array
    v: Array


class QKV(NamedTuple):
    """Queries, keys and values of one stream; q is None where only its keys and values are wanted."""

    q: Array | None
    k: Array
    v: Array

    @property
    def kv(self) -> KV:
        return KV(self.k, self.v)


def attend(q: Array, k: Array, v: Array, *, implementation: str = "blocks", causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(h)) v for q (B, S, H, h), k and v (B, K, H, h)."""
    kernel: Literal["cudnn", "xla"] = "cudnn" if implementation == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=kernel)


def block_attention(streams: Sequence[QKV], context: KV | None, text: KV | None, *, implementation: str) -> list[Array]:
    """Attention of the image streams in training, all blocks at once.

    Args:
      streams: queries with their own keys and values, each (B, blocks, s, H, h); streams may have fewer blocks than others.
      context: keys and values whose blocks j < i query block i sees; None lets each block see only itself
        (`diffusion_attention = block`).
      text: (B, T, H, h) keys and values that every query sees, or None.
      implementation: reference, blocks, cudnn or splash.

    Returns:
      One output (B, blocks, s, H, h) for each stream.
    """
    function = {"reference": _reference, "splash": _splash}.get(implementation)
    if function is None:
        function = partial(_blocks, implementation=implementation)
    return function(streams, context, text)


def _blocks(streams: Sequence[QKV], context: KV | None, text: KV | None, *, implementation: str) -> list[Array]:
    outputs: list[list[Array]] = [[] for _ in streams]
    for i in range(max(stream.k.shape[1] for stream in streams)):
        present = [n for n, stream in enumerate(streams) if i < stream.k.shape[1]]
        own = [QKV(*(x[:, i] for x in _with_query(streams[n]))) for n in present]
        keys, values = zip(*(_visible(x.kv, context, text, i) for x in own), strict=True)
        q = jnp.concatenate([x.q for x in own if x.q is not None])  # (streams * B, s, H, h)
        out = attend(q, jnp.concatenate(keys), jnp.concatenate(values), implementation=implementation)
        for n, part in zip(present, jnp.split(out, len(present)), strict=True):
            outputs[n].append(part)
    return [jnp.stack(blocks, axis=1) for blocks in outputs]


def _with_query(stream: QKV) -> tuple[Array, Array, Array]:
    if stream.q is None:
        raise ValueError("a stream without queries can only be context")
    return stream.q, stream.k, stream.v


def _visible(own: KV, context: KV | None, text: KV | None, block: int) -> KV:
    """Keys and values (B, K, H, h) that a query of block `block` with own keys (B, s, H, h) sees."""
    parts = [] if text is None else [text]
    if context is not None and block:
        parts.append(KV(*(x[:, :block].reshape(x.shape[0], -1, *x.shape[3:]) for x in context)))
    return KV(*(jnp.concatenate(x, axis=1) for x in zip(*parts, own, strict=True)))


def cached_attention(
    own: QKV, context: KV | None, text: KV | None, block: int | Array, *, implementation: str
) -> Array:
    """Attention of one block against the cache, in sampling; the same rule as `block_attention`.

    Args:
      own: queries, keys and values of the block, each (B, 1, s, H, h).
      context: cached keys and values (B, slots, s, H, h), of which slots j < block are filled; None: see only itself.
      text: (B, T, H, h) or None.
      block: index i of the block. Traced, it selects among one program for each i, so that unfilled slots cost nothing.

    Returns:
      (B, 1, s, H, h).
    """
    q, k, v = (x[:, 0] for x in _with_query(own))
    inner = implementation if implementation == "cudnn" else "blocks"

    def at(i: int, q: Array, own: KV, context: KV | None, text: KV | None) -> Array:
        return attend(q, *_visible(own, context, text, i), implementation=inner)[:, None]

    if context is None or isinstance(block, int):
        return at(int(block) if context is not None else 0, q, KV(k, v), context, text)
    branches = [partial(at, i) for i in range(context.k.shape[1] + 1)]
    return jax.lax.switch(block, branches, q, KV(k, v), context, text)


def _reference(streams: Sequence[QKV], context: KV | None, text: KV | None) -> list[Array]:
    """The dense mask over all keys, for tests: (blocks * s)^2 scores."""
    outputs = []
    for stream in streams:
        q, k, v = _with_query(stream)
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
            keys.append(text.k)
            values.append(text.v)
            masks.append(jnp.ones((len(i), text.k.shape[1]), bool))
        out = jax.nn.dot_product_attention(
            q.reshape(batch, -1, *q.shape[3:]),
            jnp.concatenate(keys, axis=1),
            jnp.concatenate(values, axis=1),
            mask=jnp.concatenate(masks, axis=1)[None, None],
        )
        outputs.append(out.reshape(q.shape))
    return outputs


def _splash(streams: Sequence[QKV], context: KV | None, text: KV | None) -> list[Array]:
    raise ConfigError("config.model.attention='splash' is not available.")


def choose(name: str, platform: str, dtype: str) -> str:
    """The implementation that `config.model.attention` means on a platform (cpu, gpu, tpu)."""
    if name != "auto":
        return name
    if platform == "gpu" and dtype == "bfloat16":
        return "cudnn"
    return "splash" if platform == "tpu" else "blocks"
