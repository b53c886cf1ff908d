"""QK-norm and RoPE of a GPU's training in one pass over memory each way, as Triton kernels.

XLA reads a projection twice, since the norm of a vector comes before its first use, and its gradient
takes three passes. These kernels hold a tile of tokens in registers. `attention.cudnn_stacks` calls
them. The formulas are those of `attention.qk_norm_rope`, in float32 with one rounding at the end.

Shapes use the letters of `attention.base`; n streams.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec
from jaxtyping import Float

from madformer_jax.ops.attention.qk_norm_rope import QK_NORM_EPS, ProjectedQK
from madformer_jax.runtime import partitioning

INTERPRET = False  # whether Pallas interprets the kernels, for tests on a CPU
MAX_TILE = 32  # tokens of a program
MIN_SIZE = 16  # of a tile and of half a head: what Triton handles well
_TRITON = triton.CompilerParams(num_warps=4)
_Halves = tuple[Array, Array]  # both halves of the head dimensions, each (tile, h / 2), in float32


def supports(x: Any) -> bool:
    """Returns whether the kernels take these queries or keys: a `ProjectedQK` of suitable sizes."""
    if not isinstance(x, ProjectedQK) or x.x.ndim != 5 or x.position.cos.ndim != 3:
        return False
    half = x.x.shape[-1] // 2
    return half >= MIN_SIZE and half & (half - 1) == 0 and x.x.shape[2] % MIN_SIZE == 0


def stack(projections: Sequence[ProjectedQK]) -> Float[Array, "B L n s H h"]:
    """Returns the queries or keys of the streams, stacked as by `cudnn_stacks.stack_streams`."""
    blocks = max(x.x.shape[1] for x in projections)
    scales = [x.scale.astype(jnp.float32) for x in projections]
    tables = [jnp.stack([x.position.cos, x.position.sin]) for x in projections]  # (2, L, s, h)
    arrays = [x.x for x in projections]
    run = functools.partial(_stack, blocks=blocks, count=len(projections))
    return _on_each_device(run, arrays[0], (arrays, scales, tables, list(map(_bias, projections))), 6)


def gradient(d: Float[Array, "B _ m s H h"], projection: ProjectedQK, stream: int | None) -> ProjectedQK:
    """Returns the gradients of a projection, of its scale and of its bias. The rotary table has none.

    Args:
      d: Gradient of the queries or keys: of this stream, `(B, L, 1, s, H, h)`, or the stack of `stack`.
      projection: The projection.
      stream: Index of the stream in the stack. None if d is not a stack.
    """
    x, scale, position, bias = projection
    table = jnp.stack([position.cos, position.sin])
    run = functools.partial(_gradient, stream=stream)
    dx, d_scale, d_bias = _on_each_device(run, x, (d, x, scale.astype(jnp.float32), table, _bias(projection)), 5)
    d_scale = d_scale.sum(axis=(0, 1, 2, 3)).astype(scale.dtype)
    d_bias = None if bias is None else d_bias.sum(axis=(0, 1, 2)).astype(bias.dtype)
    return ProjectedQK(dx, d_scale, jax.tree.map(jnp.zeros_like, position), d_bias)


def _bias(projection: ProjectedQK) -> Float[Array, "H h"]:
    shape = projection.x.shape[-2:]
    return jnp.zeros(shape, jnp.float32) if projection.bias is None else projection.bias.astype(jnp.float32)


def _tile(tokens: int) -> int:
    return math.gcd(tokens, MAX_TILE)


def _load(ref: Any, *index: Any) -> _Halves:
    half = ref.shape[-1] // 2
    a, b = (ref[(*index, pl.ds(n * half, half))].astype(jnp.float32) for n in range(2))
    return a, b


def _store(ref: Any, head: Any, values: _Halves) -> None:
    half = ref.shape[-1] // 2
    for n, value in enumerate(values):
        ref[:, head, pl.ds(n * half, half)] = value.astype(ref.dtype)


def _normalize(x: _Halves, bias: _Halves) -> tuple[Float[Array, "tile 1"], _Halves]:
    """Adds the bias. Returns the inverse norms and the normalized vectors."""
    x = x[0] + bias[0][None], x[1] + bias[1][None]
    squares = sum(jnp.sum(y * y, axis=-1, keepdims=True) for y in x)
    inverse = jax.lax.rsqrt(squares / (2 * x[0].shape[-1]) + QK_NORM_EPS)
    return inverse, (x[0] * inverse, x[1] * inverse)


def _stack(
    arrays: list[Array], scales: list[Array], tables: list[Array], biases: list[Array], *, blocks: int, count: int
) -> Array:
    """Computes `stack` on one device. The blocks of the result are in descending order."""
    batch, _, tokens, heads, size = arrays[0].shape
    tile = _tile(tokens)

    def write(x: Any, scale: Any, table: Any, bias: Any, out: Any) -> None:
        scale_a, scale_b = (y[None] for y in _load(scale))
        (cos_a, cos_b), (sin_a, sin_b) = (_load(table, i, slice(None)) for i in range(2))

        def head(i: Any, carry: None) -> None:
            _, (a, b) = _normalize(_load(x, slice(None), i), _load(bias, i))
            a, b = a * scale_a, b * scale_b
            _store(out, i, (a * cos_a - b * sin_a, b * cos_b + a * sin_b))
            return carry

        jax.lax.fori_loop(0, heads, head, None)

    def write_zeros(out: Any) -> None:
        def head(i: Any, carry: None) -> None:
            _store(out, i, (jnp.zeros((tile, size // 2)),) * 2)
            return carry

        jax.lax.fori_loop(0, heads, head, None)

    def kernel(*refs: Any) -> None:
        out, block, stream = refs[-1], blocks - 1 - pl.program_id(1), pl.program_id(2)
        columns = (refs[i * count : (i + 1) * count] for i in range(4))
        for n, (x, scale, table, bias) in enumerate(zip(*columns, strict=True)):
            exists = block < arrays[n].shape[1]
            pl.when((stream == n) & exists)(functools.partial(write, x, scale, table, bias, out))
            pl.when((stream == n) & ~exists)(functools.partial(write_zeros, out))

    def at(n: int) -> Callable[[Any, Any], Any]:
        return lambda p, t: (jnp.minimum(blocks - 1 - p, arrays[n].shape[1] - 1), t)

    specs = [
        pl.BlockSpec((None, None, tile, heads, size), lambda b, p, _, t, n=n: (b, *at(n)(p, t), 0, 0))
        for n in range(count)
    ]
    specs += [pl.BlockSpec((size,), lambda *_: (0,))] * count
    specs += [pl.BlockSpec((2, None, tile, size), lambda _, p, __, t, n=n: (0, *at(n)(p, t), 0)) for n in range(count)]
    specs += [pl.BlockSpec((heads, size), lambda *_: (0, 0))] * count
    return pl.pallas_call(
        kernel,
        grid=(batch, blocks, count, tokens // tile),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, None, None, tile, heads, size), lambda b, p, n, t: (b, p, n, t, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, blocks, count, tokens, heads, size), arrays[0].dtype),
        compiler_params=_TRITON,
        interpret=INTERPRET,
        name="qk_norm_rope",
    )(*arrays, *scales, *tables, *biases)


def _gradient(
    d: Array, x: Array, scale: Array, table: Array, bias: Array, *, stream: int | None
) -> tuple[Float[Array, "B L s H h"], Float[Array, "B L tiles 1 h"], Float[Array, "B L tiles H h"]]:
    """Computes `gradient` on one device, with sums over the tokens of a tile for the scale and the bias."""
    batch, blocks, tokens, heads, size = x.shape
    tile, stacked_blocks = _tile(tokens), d.shape[1]

    def kernel(d: Any, x: Any, scale: Any, table: Any, bias: Any, dx: Any, d_scale: Any, d_bias: Any) -> None:
        scale_a, scale_b = (y[None] for y in _load(scale))
        (cos_a, cos_b), (sin_a, sin_b) = (_load(table, i, slice(None)) for i in range(2))

        def head(i: Any, sums: _Halves) -> _Halves:
            inverse, (a, b) = _normalize(_load(x, slice(None), i), _load(bias, i))
            da, db = _load(d, slice(None), i)
            da, db = da * cos_a + db * sin_b, db * cos_b - da * sin_a
            sums = sums[0] + da * a, sums[1] + db * b
            da, db = da * scale_a, db * scale_b
            mean = jnp.sum(da * a + db * b, axis=-1, keepdims=True) / size
            da, db = inverse * (da - a * mean), inverse * (db - b * mean)
            _store(dx, i, (da, db))
            for n, y in enumerate((da, db)):
                d_bias[i, pl.ds(n * size // 2, size // 2)] = jnp.sum(y, axis=0)
            return sums

        zeros = jnp.zeros((tile, size // 2))
        sums = jax.lax.fori_loop(0, heads, head, (zeros, zeros))
        for n, y in enumerate(sums):
            d_scale[pl.ds(n * size // 2, size // 2)] = jnp.sum(y, axis=0)

    def d_index(b: Any, i: Any, t: Any) -> Any:
        return (b, i, 0, t, 0, 0) if stream is None else (b, stacked_blocks - 1 - i, stream, t, 0, 0)

    array = pl.BlockSpec((None, None, tile, heads, size), lambda b, i, t: (b, i, t, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=(batch, blocks, tokens // tile),
        in_specs=[
            pl.BlockSpec((None, None, None, tile, heads, size), d_index),
            array,
            pl.BlockSpec((size,), lambda *_: (0,)),
            pl.BlockSpec((2, None, tile, size), lambda _, i, t: (0, i, t, 0)),
            pl.BlockSpec((heads, size), lambda *_: (0, 0)),
        ],
        out_specs=[
            array,
            pl.BlockSpec((None, None, None, None, size), lambda b, i, t: (b, i, t, 0, 0)),
            pl.BlockSpec((None, None, None, heads, size), lambda b, i, t: (b, i, t, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct((batch, blocks, tokens // tile, n, size), jnp.float32) for n in (1, heads)),
        ],
        compiler_params=_TRITON,
        interpret=INTERPRET,
        name="qk_norm_rope_gradient",
    )(d, x, scale, table, bias)


def _on_each_device(function: Callable[..., Any], x: Array, args: tuple[Any, ...], result_axes: int) -> Any:
    """Runs a kernel on each device's own images and heads, as the compiler cannot split it.

    Args:
      function: Function of `args`.
      x: A projection `(B, L, s, H, h)`, whose batch and heads are split where the mesh divides them.
      args: Trees of arrays. Those of five and six axes are split as `x`, and those of two by heads. The
        others are replicated.
      result_axes: Number of axes of the results: 6 of one, or 5 of each of three.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*args)
    batch, heads = partitioning.batch_and_head_axes(mesh, x.shape[0], x.shape[-2])

    def spec(axes: int) -> PartitionSpec:
        if axes == 2:
            return PartitionSpec(heads)
        return PartitionSpec(batch, *[None] * (axes - 3), heads) if axes >= 5 else PartitionSpec()

    in_specs = jax.tree.map(lambda y: spec(jnp.ndim(y)), args)
    out_specs = spec(6) if result_axes == 6 else (spec(5),) * 3
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)
