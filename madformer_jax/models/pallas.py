"""Skip-causal attention on a TPU (MADFormer, section 3.2): one kernel for training and sampling, one for the gradient.

Queries, keys and values have their tokens along the last axis, (B, H, h, tokens): a TPU's registers are 128 wide, and half empty with
heads of 64 along them. A step of the kernel has a tile of one head's queries and all keys that they may see in fast memory; it goes
over the tiles of those that they do see, so nothing else is computed. `images` stand one after the other along the tokens.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.sharding import PartitionSpec

from madformer_jax.runtime import partitioning

KEPT = "attention"  # name of the kernel's output and sums in a policy of jax.checkpoint
LANES = 128
_FAST = 16 * 2**20  # bytes of fast memory that a kernel may have by default
_LEAST = -1e30  # score of a key that is not seen; -inf less itself would be no number

Pair = tuple[Array, Array]  # keys and values


def tile(tokens: int) -> int | None:
    """Side of the kernel's square tiles of which a block of `tokens` tokens consists; None where no size fits."""
    return next((side for side in (256, LANES) if tokens % side == 0), None)


def images_in_a_row(batch: int) -> int:
    """How many images of a batch stand one after the other in one row of tokens: all of a device's.

    A kernel's gradient sums over the tokens of all images, and a TPU copies them into a row where they are not in one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else partitioning.batch_devices(mesh)
    return batch // parts if batch % parts == 0 else batch


def laid_out(x: Array) -> Array:
    """X, and its gradient, in memory in the order of its axes, where the compiler's own choice would cost copies."""
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def filled(text: Array, images: int) -> Array:
    """The text's keys (..., images * T), each image's filled up to whole registers."""
    x = text.reshape(*text.shape[:-1], images, -1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]).reshape(*text.shape[:-1], -1)


def on_each_device(function: Callable[..., Array], q: Array, *args: Any) -> Array:
    """Runs a function of arrays (B, H, ...) on each device's own images and heads: the compiler cannot split a kernel.

    Arrays of five axes have those of the layers first; those of one have no heads, and numbers are everybody's. Images or heads that
    their mesh axes do not divide are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(q, *args)
    names = nn.logical_to_mesh_axes(("batch", "heads")) or ((), ())
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in names]
    sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
    batch, heads = (names if size % n == 0 else None for names, size, n in zip(axes, q.shape, sizes))
    specs = {0: (), 1: (batch,), 4: (batch, heads), 5: (None, batch, heads)}
    in_specs = jax.tree.map(lambda x: PartitionSpec(*specs[jnp.ndim(x)]), (q, *args))
    return jax.shard_map(function, in_specs=in_specs, out_specs=in_specs[0], check_vma=False)(q, *args)


# ---- what is called


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend(
    q: Array,
    own: Pair | None,
    context: Pair | None,
    text: Pair | None,
    lengths: Array | None,
    images: int,
    tokens: int,
    interpret: bool,
) -> Array:
    """Attention of all blocks of a stream, in training.

    Args:
      q: (B, H, h, images * blocks * tokens), B rows of `images` images.
      own: keys and values of the stream, as q; None where the context has them.
      context: keys and values whose blocks j < i query block i sees (j <= i without `own`); None: none.
      text: (B, H, h, images * T), T a multiple of 128.
      lengths: how many of the T are seen, (B * images,); None without text.
      tokens: of a block; a multiple of 128.

    Returns:
      As q.
    """
    return _saved(q, own, context, text, lengths, images, tokens, interpret)[0]


def cached(
    q: Array,
    own: Pair,
    context: Pair | None,
    text: Pair | None,
    lengths: Array | None,
    layer: int | Array,
    block: int | Array,
    interpret: bool,
) -> Array:
    """Attention of one block's queries (B, H, h, tokens) in sampling, with the first `block` slots of the context filled.

    Args:
      own: keys and values of the block, as q.
      context: (layers, B, H, h, slots * tokens), finite where it is not filled, of which the kernel reads layer `layer`.
      text: (layers, B, H, h, T), T a multiple of 128, of which the first `lengths` (B,) are seen.
    """
    tokens = q.shape[3]
    seen = 0 if context is None else context[0].shape[4] / tokens / 2  # on average of all blocks
    return _forward(q, own, context, text, lengths, layer, block, seen, 1, tokens, interpret)[0]


# ---- the forward kernel


class _Source(NamedTuple):
    """Keys and values (h, ...) that a tile of queries sees: the first `count` tiles of `side`, but what stands behind `length`."""

    k: Any
    v: Any
    side: int
    count: Any
    length: Any = None

    def at(self, j: Any) -> Any:
        return pl.ds(pl.multiple_of(j * self.side, self.side), self.side)

    def scores(self, j: Any, q: Array) -> Array:
        """Of the queries (h, queries) with the keys of a tile, (side, queries)."""
        found = _dot(self.k[:, self.at(j)], q, (0, 0))
        if self.length is None:
            return found
        position = j * self.side + jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
        return jnp.where(position < self.length, found, _LEAST)


def _sources(kinds: Sequence[str], refs: Sequence[Any], numbers: Any, tokens: int, side: int) -> list[_Source]:
    """What the queries of this step see; `numbers` are the layer, the first block, and the length of each image's text."""
    tiles = tokens // side
    block = numbers[1] + jax.lax.div(pl.program_id(3), tiles)
    length = numbers[2 + pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]
    seen: dict[str, tuple[Any, ...]] = {
        "own": (side, tiles),
        "context": (side, (block + ("own" not in kinds)) * tiles),
        "text": (LANES, jax.lax.div(length + LANES - 1, LANES), length),
    }
    return [_Source(k, v, *seen[kind]) for kind, k, v in zip(kinds, refs[::2], refs[1::2], strict=True)]


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of two matrices, summed over an axis of each."""
    return jax.lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(numbers: Any, q_ref: Any, *refs: Any, kinds: Sequence[str], tokens: int) -> None:
    """One tile of queries, as flash attention: weights of 2 to the power of the scores, less the largest so far."""
    *keys, out, sums = refs
    q = q_ref[...]
    size, side = q.shape
    scale = _scale(size)
    state = (
        jnp.zeros((size, side), jnp.float32),
        jnp.full((1, side), _LEAST, jnp.float32),
        jnp.zeros((1, side), jnp.float32),
    )

    for source in _sources(kinds, keys, numbers, tokens, side):

        def see(j: Any, state: tuple[Array, ...], source: _Source = source) -> tuple[Array, ...]:
            weighted, top, total = state
            scores = source.scores(j, q)
            new = jnp.maximum(top, scores.max(axis=0, keepdims=True) * scale)
            weights, old = jnp.exp2(scores * scale - new), jnp.exp2(top - new)
            v = source.v[:, source.at(j)]
            weighted = weighted * old + _dot(v, weights.astype(v.dtype), (1, 0))
            return weighted, new, total * old + weights.sum(axis=0, keepdims=True)

        state = jax.lax.fori_loop(0, source.count, see, state)
    weighted, top, total = state
    out[...] = (weighted / total).astype(out.dtype)
    sums[...] = top + jnp.log2(total)


def _backward_kernel(
    numbers: Any, q_ref: Any, out: Any, d_out: Any, sums: Any, *refs: Any, kinds: Sequence[str], tokens: int
) -> None:
    """One tile of queries; the gradients of keys and values are summed in fast memory until their last queries have come."""
    count = 2 * len(kinds)
    keys, dq_ref, d_keys, totals = refs[:count], refs[count], refs[count + 1 : -count], refs[-count:]
    q, gradient, logs = q_ref[...], d_out[...], sums[...]
    size, side = q.shape
    mean = (out[...].astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=0, keepdims=True)
    tiles, step = tokens // side, pl.program_id(3)
    first = {"own": jax.lax.rem(step, tiles) == 0}
    last = {"own": jax.lax.rem(step, tiles) == tiles - 1}

    dq = jnp.zeros((size, side), jnp.float32)
    sources = _sources(kinds, keys, numbers, tokens, side)
    for n, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
        sums_of = totals[2 * n : 2 * n + 2]

        @pl.when(first.get(kind, step == 0))
        def _(sums_of: Sequence[Any] = sums_of) -> None:
            for total in sums_of:
                total[...] = jnp.zeros_like(total)

        def see(j: Any, dq: Array, source: _Source = source, sums_of: Sequence[Any] = sums_of) -> Array:
            at = source.at(j)
            weights = jnp.exp2(source.scores(j, q) * _scale(size) - logs)
            d_scores = (weights * (_dot(source.v[:, at], gradient, (0, 0)) - mean)).astype(q.dtype)
            sums_of[0][:, at] += _dot(q, d_scores, (1, 1))
            sums_of[1][:, at] += _dot(gradient, weights.astype(q.dtype), (1, 1))
            return dq + _dot(source.k[:, at], d_scores, (1, 0))

        dq = jax.lax.fori_loop(0, source.count, see, dq)

        @pl.when(last.get(kind, step == pl.num_programs(3) - 1))
        def _(n: int = n, sums_of: Sequence[Any] = sums_of) -> None:
            for total, result, scale in zip(sums_of, d_keys[2 * n : 2 * n + 2], (size**-0.5, 1.0), strict=True):
                result[...] = (total[...] * scale).astype(result.dtype)

    dq_ref[...] = (dq * size**-0.5).astype(dq_ref.dtype)


def _scale(size: int) -> float:
    """Of the scores, whose weights are powers of two."""
    return size**-0.5 * math.log2(math.e)


# ---- what runs them


def _forward(
    q: Array,
    own: Pair | None,
    context: Pair | None,
    text: Pair | None,
    lengths: Array | None,
    layer: int | Array,
    block: int | Array,
    seen: float,
    images: int,
    tokens: int,
    interpret: bool,
) -> tuple[Array, Array]:
    """The output, as q, and the logarithms of the sums of weights, base 2, (B, H, 1, queries); `seen`: context blocks, on average."""
    kinds, keys = _present(own, context, text)
    sums = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32)
    numbers = _numbers(layer, block, lengths, len(q) * images)
    results = [("query", jax.ShapeDtypeStruct(q.shape, q.dtype)), ("query", sums)]
    return _run(_forward_kernel, kinds, numbers, [("query", q), *keys], results, 2, seen, images, tokens, interpret)


def _saved(*args: Any) -> tuple[Array, Any]:
    q, own, context, text, lengths, images, tokens, interpret = args
    context, text = (None if x is None else tuple(part[None] for part in x) for x in (context, text))
    out, sums = _forward(q, own, context, text, lengths, 0, 0, _seen(q, own, images, tokens), images, tokens, interpret)
    out, sums = _kept(out), _kept(sums)
    return out, (q, own, context, text, lengths, out, sums)


def _seen(q: Array, own: Pair | None, images: int, tokens: int) -> float:
    """Context blocks that a block sees in training, on average."""
    return (q.shape[3] // images // tokens - 1) / 2 + (own is None)


def _kept(x: Array) -> Array:
    """X, which a policy keeps by name as whole numbers: of others jax.checkpoint would round a copy."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, KEPT), x.dtype)


def _backward(images: int, tokens: int, interpret: bool, saved: Any, d_out: Array) -> Any:
    q, own, context, text, lengths, out, sums = saved
    kinds, keys = _present(own, context, text)
    given = [("query", x) for x in (q, out, d_out, sums)] + keys
    results = [(kind, jax.ShapeDtypeStruct(x.shape, x.dtype)) for kind, x in [("query", q), *keys]]
    seen, numbers = _seen(q, own, images, tokens), _numbers(0, 0, lengths, len(q) * images)
    dq, *d_keys = _run(_backward_kernel, kinds, numbers, given, results, 5, seen, images, tokens, interpret)
    by_kind = {kind: tuple(d_keys[2 * n : 2 * n + 2]) for n, kind in enumerate(kinds)}
    d_stacked = (by_kind.get(kind) and tuple(x[0] for x in by_kind[kind]) for kind in ("context", "text"))
    return dq, by_kind.get("own"), *d_stacked, None


attend.defvjp(_saved, _backward)


def _present(
    own: Pair | None, context: Pair | None, text: Pair | None
) -> tuple[tuple[str, ...], list[tuple[str, Array]]]:
    """The kinds of keys that there are, and their arrays, each with its kind."""
    given = {"own": own, "context": context, "text": text}
    keys = [(kind, x) for kind, pair in given.items() if pair is not None for x in pair]
    return tuple(dict.fromkeys(kind for kind, _ in keys)), keys


def _numbers(layer: int | Array, block: int | Array, lengths: Array | None, images: int) -> Array:
    """What the kernel reads as numbers, see `_sources`."""
    lengths = jnp.zeros(images, jnp.int32) if lengths is None else lengths
    return jnp.concatenate([jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, block)]), lengths.astype(jnp.int32)])


def _run(
    kernel: Any,
    kinds: tuple[str, ...],
    numbers: Array,
    given: Sequence[tuple[str, Array]],
    results: Sequence[tuple[str, jax.ShapeDtypeStruct]],
    products: int,
    seen: float,
    images: int,
    tokens: int,
    interpret: bool,
) -> Any:
    """A kernel on the grid of rows, images, heads and tiles of queries; `products` of each query and key that it sees."""
    q = given[0][1]
    batch, heads, size, rows = q.shape
    side = tile(tokens) or tokens  # which no TPU takes, but its interpreter does

    def shape(kind: str, x: Any) -> tuple[int, int]:
        """What one step has of an array: a tile of queries, the keys of their block, or of the image's all blocks or text."""
        return x.shape[-2], {"query": side, "own": tokens}.get(kind, x.shape[-1] // images)

    def spec(kind: str, x: Any) -> pl.BlockSpec:
        count = x.shape[-1] // images // shape(kind, x)[1]

        def at(row: Any, image: Any, head: Any, step: Any, numbers: Any) -> tuple[Any, ...]:
            column = image * count + {"query": step, "own": jax.lax.div(step, tokens // side)}.get(kind, 0)
            return (*([numbers[0]] if x.ndim == 5 else []), row, head, 0, column)

        return pl.BlockSpec((*[None] * (x.ndim - 2), *shape(kind, x)), at)

    keys = {kind: x.shape[-1] // images for kind, x in given if kind in kinds}
    per_query = sum({"own": tokens, "context": seen * tokens}.get(kind, width) for kind, width in keys.items())
    pairs = batch * heads * rows * per_query
    arrays: list[tuple[str, Any]] = [*given, *results]
    totals = [shape(*x) for x in results[1:]] if kernel is _backward_kernel else []
    # two steps' arrays, the sums, and what a tile leaves there
    fast = sum(2 * math.prod(shape(kind, x)) * x.dtype.itemsize for kind, x in arrays)
    fast += sum(4 * math.prod(total) for total in totals) + 4 * 2**20
    return pl.pallas_call(
        functools.partial(kernel, kinds=kinds, tokens=tokens),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, images, heads, rows // images // side),
            in_specs=[spec(*x) for x in given],
            out_specs=[spec(*x) for x in results],
            scratch_shapes=[tpu.VMEM(total, jnp.float32) for total in totals],
        ),
        out_shape=[x for _, x in results],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=max(fast, _FAST)
        ),
        cost_estimate=pl.CostEstimate(
            flops=round(2 * products * size * pairs),
            transcendentals=round(pairs),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for _, x in arrays),
        ),
        interpret=interpret,
        name=f"block_attention{kernel.__name__.removesuffix('_kernel')}",
    )(numbers, *(x for _, x in given))
