"""Pallas TPU kernels of attention, forward and backward: one step of their grid.

`attention.pallas_tpu` runs them and defines the grid. A step holds a tile of queries of one head,
`(h, side)`, and all keys and values that they may see, `(h, n)`, in VMEM. In training, queries and
keys are projections. QK-norm and RoPE run here, because separate operations would read and write
memory four times.

Keys and values come from up to three kinds of sources: the text, the context and the block itself
("self"). Inputs, scratch memory and gradients are dictionaries by kind.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jaxtyping import Float, PyTree

from madformer_jax.ops.attention.qk_norm_rope import Projectable, ProjectedQK, apply_qk_norm_rope, is_projected
from madformer_jax.ops.rope import RotaryTable

LANES = 128
_BFLOAT16_SUBLANES = 16  # rows of a bfloat16 register
UNROLL_FACTORS = (4, 2, 1)  # tiles of keys; 8 would save 2 % of the time and double the program
_MASKED_SCORE = -1e30  # score of a hidden key; -inf - -inf would be NaN
_LN_2 = math.log(2)  # factor from the gradient of exp to that of a power of two

# In training keys are a `ProjectedQK` with a scale (h, 1) and a table (h, n) for the n tokens of an image.
KeyValuePair = tuple[Projectable, Projectable]  # keys and values
Index = int | Array
Columns = slice | pl.Slice


class _KeySource(NamedTuple):
    """Keys and values `(h, ...)` that a tile of queries attends to.

    The first `tiles` tiles of `side` keys are visible, except for keys from `length` on.
    """

    k: Ref
    v: Ref
    side: int
    tiles: Index
    length: Index | None = None

    def tile(self, j: Index) -> Columns:
        return _tile_slice(j, self.side)

    def scores(self, j: Index, q: Float[Array, "h queries"]) -> Float[Array, "_ queries"]:
        """Returns the scores of queries with the keys of tile j."""
        scores = _matmul(self.k[:, self.tile(j)], q, (0, 0))
        if self.length is None:
            return scores
        position = j * self.side + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        return jnp.where(position < self.length, scores, _MASKED_SCORE)


def text_tile_size(text_tokens: int) -> int:
    """Returns the tile size of text keys, below `LANES` for a short text such as a class."""
    return LANES if text_tokens > LANES // 2 else -(-text_tokens // _BFLOAT16_SUBLANES) * _BFLOAT16_SUBLANES


def _tile_slice(j: Index, side: int) -> Columns:
    return pl.ds(j * side if isinstance(j, int) else pl.multiple_of(j * side, side), side)


def _for_each_tile(x: Ref, side: int, function: Callable[[Columns], None]) -> None:
    """Calls a function with the slice of the columns of each tile of `x` `(h, n)`."""
    side = math.gcd(side, x.shape[1])
    jax.lax.fori_loop(0, x.shape[1] // side, lambda j, _: function(_tile_slice(j, side)), None)


def _key_sources(
    keys: dict[str, KeyValuePair], scalars: Ref, tokens: int, text_tokens: int, side: int
) -> dict[str, _KeySource]:
    """Returns the sources that the queries of this step attend to, by kind.

    Args:
      keys: Keys and values by kind.
      scalars: Index of the layer, index of the first block, and the text length of each image.
      tokens: Tokens of a block.
      text_tokens: Text tokens before padding.
      side: Side of a tile.
    """
    tiles, text_tile = tokens // side, text_tile_size(text_tokens)
    block = scalars[1] + jax.lax.div(pl.program_id(3), tiles)
    length = scalars[2 + pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]
    visible: dict[str, tuple[int, Index] | tuple[int, Index, Array]] = {
        "self": (side, tiles),
        "context": (side, (block + ("self" not in keys)) * tiles),
        "text": (text_tile, jax.lax.div(length + LANES - 1, LANES) if text_tile == LANES else 1, length),
    }
    return {kind: _KeySource(*pair, *visible[kind]) for kind, pair in keys.items()}


def _first_and_last_step(kind: str, tiles: int) -> tuple[Array, Array]:
    """Returns whether this step is the first and whether it is the last to see the same keys.

    Only the tiles of a block see its own keys. All steps of an image see the context and the text.
    """
    count = tiles if kind == "self" else pl.num_programs(3)
    step = jax.lax.rem(pl.program_id(3), count)
    return step == 0, step == count - 1


def _norm_rope_columns(
    x: Float[Array, "h n"], scale: Float[Array, "h _"], projected: ProjectedQK, columns: Columns, factor: float = 1.0
) -> Float[Array, "h n"]:
    """Applies QK-norm and RoPE to columns of a projection.

    Args:
      x: The columns.
      scale: QK-norm scale.
      projected: Projection whose rotary table is used.
      columns: Slice of the columns in the table.
      factor: Further factor of the scale.
    """
    table = RotaryTable(*(angles[:, columns] for angles in projected.position))
    return apply_qk_norm_rope(x, scale * factor, table, axis=0)


def _scaled_queries(q: Projectable) -> Float[Array, "h queries"]:
    """Returns the queries of a step, scaled by `_query_scale`."""
    if is_projected(q):
        return _norm_rope_columns(q.x[...], q.scale[...], q, pl.ds(0, q.x.shape[1]), _query_scale(len(q.x)))
    return (q[...].astype(jnp.float32) * _query_scale(len(q))).astype(q.dtype)


def _prepare_keys(
    keys: dict[str, KeyValuePair], key_scratch: dict[str, Ref], tiles: int, side: int
) -> dict[str, KeyValuePair]:
    """Returns keys and values, with QK-norm and RoPE applied to projected keys.

    The first step that sees projected keys writes the result to `key_scratch`.
    """
    for kind, target in key_scratch.items():
        first, _ = _first_and_last_step(kind, tiles)

        @pl.when(first)
        def _(projected: ProjectedQK = keys[kind][0], target: Ref = target) -> None:
            def write_tile(columns: Columns) -> None:
                target[:, columns] = _norm_rope_columns(
                    projected.x[:, columns], projected.scale[...], projected, columns
                )

            _for_each_tile(target, side, write_tile)

    return {kind: (key_scratch.get(kind, k), v) for kind, (k, v) in keys.items()}


def _fold_tiles(count: Index, see: Callable[[Sequence[Index], PyTree], PyTree], state: PyTree) -> PyTree:
    """Folds `see` over the tiles.

    The loop is unrolled by 4, 2 or 1 so that products and exponentials overlap.
    """
    if isinstance(count, int) and count == 1:  # a static index allows a tile of any size
        return see([0], state)
    first: Index = 0
    for size in UNROLL_FACTORS:
        groups = jax.lax.div(count - first, size)

        def group(j: Index, state: PyTree, first: Index = first, size: int = size) -> PyTree:
            return see([first + size * j + n for n in range(size)], state)

        state = jax.lax.fori_loop(0, groups, group, state)
        first = first + size * groups
    return state


def _matmul(a: Float[Array, "_ _"], b: Float[Array, "_ _"], axes: tuple[int, int]) -> Float[Array, "_ _"]:
    """Multiplies two matrices, summed over an axis of each, in float32."""
    return jax.lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())), preferred_element_type=jnp.float32)


def _query_scale(size: int) -> float:
    """Returns the factor of queries for which softmax weights are powers of two."""
    return size**-0.5 * math.log2(math.e)


def forward(
    scalars: Ref,
    q: Projectable,
    keys: dict[str, KeyValuePair],
    out: Ref,
    lse: Ref,
    key_scratch: dict[str, Ref],
    *,
    tokens: int,
    text_tokens: int,
) -> None:
    """Computes attention of one tile of queries, as flash attention does.

    Weights are 2 to the power of the score minus the largest score so far. `lse` has base 2.
    """
    size, side = out.shape
    queries = _scaled_queries(q)
    keys = _prepare_keys(keys, key_scratch, tokens // side, side)
    state = (
        jnp.zeros((size, side), jnp.float32),
        jnp.full((1, side), _MASKED_SCORE, jnp.float32),
        jnp.zeros((1, side), jnp.float32),
    )

    for source in _key_sources(keys, scalars, tokens, text_tokens, side).values():

        def see(tiles: Sequence[Index], state: tuple[Array, ...], source: _KeySource = source) -> tuple[Array, ...]:
            weighted, maximum, denominator = state
            scores = [source.scores(j, queries) for j in tiles]
            new_maximum = functools.reduce(jnp.maximum, (x.max(axis=0, keepdims=True) for x in scores), maximum)
            correction = jnp.exp2(maximum - new_maximum)
            weighted, denominator = weighted * correction, denominator * correction
            for j, x in zip(tiles, scores, strict=True):
                weights, v = jnp.exp2(x - new_maximum), source.v[:, source.tile(j)]
                weighted += _matmul(v, weights.astype(v.dtype), (1, 0))
                denominator += weights.sum(axis=0, keepdims=True)
            return weighted, new_maximum, denominator

        state = _fold_tiles(source.tiles, see, state)
    weighted, maximum, denominator = state
    out[...] = (weighted / denominator).astype(out.dtype)
    lse[...] = maximum + jnp.log2(denominator)


def backward(
    scalars: Ref,
    q: Projectable,
    keys: dict[str, KeyValuePair],
    out: Ref,
    d_out: Ref,
    lse: Ref,
    dq: Ref,
    d_keys: dict[str, Projectable],
    key_scratch: dict[str, Ref],
    accumulators: dict[str, KeyValuePair],
    *,
    tokens: int,
    text_tokens: int,
) -> None:
    """Computes the gradients of one tile of queries.

    `accumulators` in VMEM sum the gradients of keys and values up to the last queries that see
    them. For projections, `d_keys["scales"]` `(h, n * lanes)` receives the gradients of the QK-norm
    scales of queries and of keys, sorted by kind. They are summed except over the lanes.
    """
    size, side = dq.shape
    tiles, gradient, log_weights = tokens // side, d_out[...], lse[...]
    mean = (out[...].astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=0, keepdims=True)

    if is_projected(q):
        d_scales = d_keys["scales"]

        @pl.when(pl.program_id(3) == 0)
        def _() -> None:
            d_scales[...] = jnp.zeros_like(d_scales)

    def projection_gradient(
        projected: ProjectedQK, columns: Columns, factor: float, index: int, dy: Float[Array, "h n"]
    ) -> Float[Array, "h n"]:
        """Returns the gradient of columns of a projection from that of queries or keys.

        Adds the gradient of the scale to `d_scales`, at position `index`.
        """
        x = projected.x[:, columns]
        scale = jnp.broadcast_to(projected.scale[...], x.shape)
        _, vjp = jax.vjp(lambda x, scale: _norm_rope_columns(x, scale, projected, columns, factor), x, scale)
        dx, d_scale = vjp(dy.astype(x.dtype))
        lanes = d_scales.shape[1] // (1 + len(key_scratch))
        d_scales[:, pl.ds(index * lanes, lanes)] += sum(jnp.split(d_scale, side // lanes, axis=1))
        return dx

    queries = _scaled_queries(q)
    d_queries = jnp.zeros((size, side), jnp.float32)
    prepared = _prepare_keys(keys, key_scratch, tiles, side)
    for kind, source in _key_sources(prepared, scalars, tokens, text_tokens, side).items():
        dk, dv = accumulators[kind]
        first, last = _first_and_last_step(kind, tiles)

        @pl.when(first)
        def _(pair: KeyValuePair = (dk, dv)) -> None:
            def clear_tile(columns: Columns) -> None:
                for accumulator in pair:
                    accumulator[:, columns] = jnp.zeros_like(accumulator[:, columns])

            _for_each_tile(pair[0], side, clear_tile)

        def see(j: Sequence[Index], d_queries: Array, source: _KeySource = source, dk: Ref = dk, dv: Ref = dv) -> Array:
            slices = [source.tile(n) for n in j]
            weights = [jnp.exp2(source.scores(n, queries) - log_weights) for n in j]
            d_weights = [_matmul(source.v[:, columns], gradient, (0, 0)) - mean for columns in slices]
            d_scores = [(x * y).astype(queries.dtype) for x, y in zip(weights, d_weights, strict=True)]
            for columns, tile_weights, d_tile in zip(slices, weights, d_scores, strict=True):
                dk[:, columns] += _matmul(queries, d_tile, (1, 1))
                dv[:, columns] += _matmul(gradient, tile_weights.astype(queries.dtype), (1, 1))
                d_queries += _matmul(source.k[:, columns], d_tile, (1, 0))
            return d_queries

        d_queries = _fold_tiles(source.tiles, see, d_queries)

        @pl.when(last)
        def _(kind: str = kind, dk: Ref = dk, dv: Ref = dv) -> None:
            dk_out, dv_out = d_keys[kind]

            def write_tile(columns: Columns) -> None:
                dv_out[:, columns] = dv[:, columns].astype(dv_out.dtype)
                gradient = dk[:, columns] * _LN_2
                if kind in key_scratch:
                    index = 1 + sorted(key_scratch).index(kind)
                    gradient = projection_gradient(keys[kind][0], columns, 1.0, index, gradient)
                dk_out[:, columns] = gradient.astype(dk_out.dtype)

            _for_each_tile(dk, side, write_tile)

    d_queries *= _LN_2
    if is_projected(q):
        scaled = projection_gradient(q, pl.ds(0, side), _query_scale(size), 0, d_queries)
    else:
        scaled = d_queries * _query_scale(size)
    dq[...] = scaled.astype(dq.dtype)
