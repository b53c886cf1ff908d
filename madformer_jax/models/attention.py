"""Skip-causal attention (MADFormer, section 3.2) in block form: what is masked is never computed.

Every query block i, of either stream, sees the text, the context blocks before i, and itself; the context is the clean
stream, or the prediction stream when there is no clean one. All visible pairs of blocks are a diagonal and, below it, a
triangle that falls apart into squares: unmasked attentions, whose results are merged (`blocks`) or one call a block (`cudnn`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from madformer_jax.errors import ConfigError


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


class Part(NamedTuple):
    """Attention to some of the keys, which `_merge` joins with that to others; in float32.

    out (..., s, h): the values weighted with exp(score - top); top (..., s): the largest score; total (..., s): the sum of the
    weights.
    """

    out: Array
    top: Array
    total: Array


def _attend_to(q: Array, k: Array, v: Array) -> Part:
    """Scaled queries (..., s, h) on keys and values (..., K, h)."""
    scores = jnp.einsum("...sh,...kh->...sk", q, k, preferred_element_type=jnp.float32)
    top = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("...sk,...kh->...sh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Part(out, top, weights.sum(axis=-1))


def _merge(a: Part, b: Part) -> Part:
    """The attention to both parts' keys."""
    top = jnp.maximum(a.top, b.top)
    x, y = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Part(a.out * x[..., None] + b.out * y[..., None], top, a.total * x + b.total * y)


def _normalised(part: Part, dtype: Any) -> Array:
    return (part.out / part.total[..., None]).astype(dtype)


def attend(q: Array, k: Array, v: Array, *, implementation: str = "blocks", causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(h)) v for q (B, S, H, h), k and v (B, K, H, h)."""
    if k.shape[1] == 1:  # it gets all the weight; XLA on CPU cannot take a product over one key in bfloat16
        return jnp.broadcast_to(v, q.shape)
    if causal or implementation == "cudnn":
        kernel: Literal["cudnn", "xla"] = "cudnn" if implementation == "cudnn" else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=kernel)
    # normalised after the product with v: on a CPU half the time of jax.nn's, which passes over the weights more often
    part = _attend_to(*(x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)))
    return _normalised(part, v.dtype).swapaxes(1, 2)


def block_attention(streams: Sequence[QKV], context: KV | None, text: KV | None, *, implementation: str) -> list[Array]:
    """Attention of the image streams in training, all blocks at once.

    Args:
      streams: queries with their own keys and values, each (B, blocks, s, H, h); streams may have fewer blocks than others.
      context: keys and values whose blocks j < i query block i sees; None lets each block see only itself
        (`diffusion_attention = block`).
      text: (B, T, H, h) keys and values that every query sees, or None.
      implementation: what `choose` gives: reference, blocks, cudnn, splash, or splash_interpret (the TPU's kernel anywhere).

    Returns:
      One output (B, blocks, s, H, h) for each stream.
    """
    if implementation == "reference":
        return _reference(streams, context, text)
    if implementation in ("splash", "splash_interpret"):
        return _splash(streams, context, text, interpret=implementation == "splash_interpret")
    if implementation == "cudnn":
        return _block_by_block(streams, context, text)
    return [_blocks(stream, context, text) for stream in streams]


def _blocks(stream: QKV, context: KV | None, text: KV | None) -> Array:
    """The diagonal as one attention of every block to itself and the text, the triangle below it as squares of 1, 2, 4, ...
    blocks: `_see_before`.
    """
    q, k, v = _with_query(stream)
    batch, blocks, _, heads, size = q.shape

    def ordered(x: Array) -> Array:
        """(B, blocks, s, H, h) -> (B, H, blocks, s, h)."""
        return x.transpose(0, 3, 1, 2, 4)

    q, k, v = ordered(q * size**-0.5), ordered(k), ordered(v)
    own = KV(k, v)
    if text is not None:
        shape = (batch, heads, blocks, text.k.shape[1], size)
        words = (jnp.broadcast_to(x.swapaxes(1, 2)[:, :, None], shape) for x in text)
        own = KV(*(jnp.concatenate(x, axis=3) for x in zip(words, own, strict=True)))
    part = _attend_to(q, *own)
    if context is not None and blocks > 1:
        missing = (1 << (blocks - 1).bit_length()) - context.k.shape[1]  # whole pairs to take keys from
        padding = ((0, 0), (0, 0), (0, max(0, missing)), (0, 0), (0, 0))
        part = _see_before(part, q, KV(*(jnp.pad(ordered(x), padding) for x in context)))
    return _normalised(part, v.dtype).transpose(0, 2, 3, 1, 4)


def _see_before(part: Part, q: Array, context: KV) -> Part:
    """Adds what each block sees of the context blocks before it; q and context (B, H, blocks, s, h), part likewise.

    In pairs of m blocks, m = 1, 2, 4, ..., the second m blocks see all of the first m. The last pair may be cut off.
    """
    heads, blocks, m = q.shape[:2], q.shape[2], 1
    while m < blocks:
        pairs, rest = divmod(blocks, 2 * m)
        groups = [(pairs, m)] if pairs else []  # (pairs, blocks in their second half)
        groups += [(1, rest - m)] if rest > m else []
        sizes = [count * (m + rows) for count, rows in groups]
        sizes += [blocks - sum(sizes)] if sum(sizes) < blocks else []
        # lax.split, because the gradient of x[a:b] is an array of zeros with a part filled
        parts = [Part(*x) for x in zip(*(jax.lax.split(x, sizes, axis=2) for x in part), strict=True)]
        for n, (queries, (count, rows)) in enumerate(zip(jax.lax.split(q, sizes, axis=2), groups, strict=False)):
            start = sum(sizes[:n])
            first, second = (Part(*x) for x in zip(*(_halves(x, count, (m, rows)) for x in parts[n]), strict=True))
            queries = _halves(queries, count, (m, rows))[1].reshape(*heads, count, -1, q.shape[-1])
            keys, values = (
                _halves(x[:, :, start : start + 2 * m * count], count, (m, m))[0].reshape(
                    *queries.shape[:3], -1, x.shape[-1]
                )
                for x in context
            )
            seen = _attend_to(queries, keys, values)
            second = _merge(second, Part(*(x.reshape(y.shape) for x, y in zip(seen, second, strict=True))))
            both = (jnp.concatenate(x, axis=3) for x in zip(first, second, strict=True))
            parts[n] = Part(*(x.reshape(y.shape) for x, y in zip(both, parts[n], strict=True)))
        part = Part(*(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True)))
        m *= 2
    return part


def _halves(x: Array, count: int, sizes: tuple[int, int]) -> Sequence[Array]:
    """(B, H, blocks, ...) in `count` runs of blocks, each split in two: (B, H, count, size, ...)."""
    return jax.lax.split(x.reshape(*x.shape[:2], count, sum(sizes), *x.shape[3:]), sizes, axis=3)


def _block_by_block(streams: Sequence[QKV], context: KV | None, text: KV | None) -> list[Array]:
    """One call of cuDNN's `attend` for each block, the streams side by side in the batch: they see the same number of keys."""
    outputs: list[list[Array]] = [[] for _ in streams]
    for i in range(max(stream.k.shape[1] for stream in streams)):
        present = [n for n, stream in enumerate(streams) if i < stream.k.shape[1]]
        own = [[x[:, i] for x in _with_query(streams[n])] for n in present]
        keys = [_visible(KV(k, v), context, text, i) for _, k, v in own]
        # image by image: a batch that is split over devices stays where it is
        q, k, v = (
            jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:])
            for x in ([q for q, _, _ in own], [kv.k for kv in keys], [kv.v for kv in keys])
        )
        out = attend(q, k, v, implementation="cudnn")  # (B * streams, s, H, h)
        out = out.reshape(-1, len(present), *out.shape[1:])
        for column, n in enumerate(present):
            outputs[n].append(out[:, column])
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
    inner = in_sampling(implementation)

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


# ---- TPU: Pallas splash attention, all blocks of all streams in one call


def _splash(streams: Sequence[QKV], context: KV | None, text: KV | None, *, interpret: bool) -> list[Array]:
    """Queries of all streams in a row against the context, the streams' own keys and the text in a row."""
    queries = [_with_query(stream)[0] for stream in streams]
    (batch, _, tokens, heads, size), dtype = queries[0].shape, queries[0].dtype
    inside = tuple(context is not None and stream.k is context.k for stream in streams)  # own keys are in the context
    kernel, rows, columns = _splash_kernel(
        tuple(q.shape[1] for q in queries),
        inside,
        0 if context is None else context.k.shape[1],
        tokens,
        0 if text is None else text.k.shape[1],
        interpret,
    )

    def in_a_row(parts: Sequence[Array], length: int) -> Array:
        """Blocks (B, blocks, s, H, h) and text (B, T, H, h), one after the other and padded: (B, H, length, h)."""
        x = jnp.concatenate([part.reshape(batch, -1, heads, size) for part in parts], axis=1)
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    keys = [] if context is None else [context]
    keys += [stream.kv for stream, is_inside in zip(streams, inside, strict=True) if not is_inside]
    keys += [] if text is None else [text]
    q = in_a_row(queries, rows) * jnp.asarray(size**-0.5, dtype)
    k, v = (in_a_row(parts, columns) for parts in zip(*keys, strict=True))
    out = _on_each_device(jax.vmap(kernel), q, k, v).swapaxes(1, 2)  # (B, rows, H, h)
    ends = np.cumsum([q.shape[1] * tokens for q in queries])
    return [x.reshape(q.shape) for x, q in zip(jnp.split(out[:, : ends[-1]], ends[:-1], axis=1), queries, strict=True)]


def _on_each_device(function: Callable[..., Array], *args: Array) -> Array:
    """Runs a function of arrays (B, H, ...) on each device's own images and heads: the compiler cannot split a kernel.

    Images or heads that their mesh axes do not divide are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*args)
    spec = nn.logical_to_mesh_axes(("batch", "heads"))
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec or ((), ())]
    sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
    spec = PartitionSpec(*(names if size % n == 0 else None for names, size, n in zip(axes, args[0].shape, sizes)))
    return jax.shard_map(function, in_specs=(spec,) * len(args), out_specs=spec, check_vma=False)(*args)


def _tile(tokens: int) -> int | None:
    """Side of the kernel's square tiles of which a block of `tokens` tokens consists; None where no size fits."""
    return next((side for side in (512, 256, 128) if tokens % side == 0), None)


@functools.lru_cache
def _splash_kernel(
    blocks: tuple[int, ...], inside: tuple[bool, ...], context: int, tokens: int, text: int, interpret: bool
) -> tuple[Any, int, int]:
    """The kernel for q, k, v (H, rows or columns, h), and its numbers of rows and columns; see `_splash` for the order.

    The tiles that the mask leaves empty are not computed; where blocks consist of whole tiles, only the text's need a mask.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    visible = []  # of blocks: a row of parts for each stream
    for n, count in enumerate(blocks):
        i, j = np.arange(count)[:, None], np.arange(context)
        own = [np.eye(count, m, dtype=bool) & (n == k) for k, m in enumerate(blocks) if not inside[k]]
        visible.append(np.concatenate([i >= j if inside[n] else i > j, *own], axis=1))
    mask = np.concatenate(visible).repeat(tokens, axis=0).repeat(tokens, axis=1)
    side = _tile(tokens) or 128
    rows, columns = (side * math.ceil(n / side) for n in (mask.shape[0], mask.shape[1] + text))
    mask = np.pad(mask, ((0, 0), (0, text)), constant_values=True)
    mask = np.pad(mask, ((0, 0), (0, columns - mask.shape[1])))
    mask = np.pad(mask, ((0, rows - mask.shape[0]), (0, 0)), mode="edge")  # a row with nothing to see would be NaN
    # what make_splash_mha does, but in NumPy: its arrays would belong to one trace, and the mask takes a second to read
    whole = masks.MultiHeadMask([masks.NumpyMask(mask)])  # for all heads
    forward, backward = (
        process(whole, (side, side), head_shards=1, q_seq_shards=1)[0]
        for process in (mask_info.process_mask, mask_info.process_mask_dkv)
    )
    sizes = splash.BlockSizes(
        block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, block_q_dq=side, block_kv_dq=side
    )
    kernel = splash.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    return kernel, rows, columns


def choose(name: str, platform: str, dtype: str, tokens: int) -> str:
    """The implementation that `config.model.attention` means on a platform (cpu, gpu, tpu) for blocks of `tokens` tokens.

    Raises:
      ConfigError: it needs another platform.
    """
    if name == "cudnn" and platform != "gpu":
        raise ConfigError(f"config.model.attention='cudnn' needs an NVIDIA GPU; this is a {platform}: 'auto' fits it.")
    if name == "splash" and platform != "tpu":
        return "splash_interpret"  # slow: the kernel's steps one by one
    if name != "auto":
        return name
    if platform == "gpu" and dtype == "bfloat16":
        return "cudnn"
    return "splash" if platform == "tpu" and _tile(tokens) else "blocks"


def in_sampling(implementation: str) -> str:
    """What `cached_attention` runs: one block's queries against keys that it sees all of need no masked kernel."""
    return "cudnn" if implementation == "cudnn" else "blocks"
