"""The kernels of attention on a TPU, forward and gradient: what one step of their grid does (`pallas.py` runs them).

A step has a tile of one head's queries (h, side), and all keys and values (h, n) that they may see, in fast memory. Queries and keys
come in training as projections; QK-norm and RoPE happen here, since by themselves they would read and write memory four times.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_qk_norm_rope, is_projected
from madformer_jax.ops.rope import RotaryTable

LANES = 128
_BFLOAT16_SUBLANES = 16  # of bfloat16 in a register
UNROLL_FACTORS = (4, 2, 1)  # tiles of keys; 8 would take 0.02 less of the time, at twice the program
_MASKED_SCORE = -1e30  # score of a key that is not seen; -inf less itself would be no number
_LN_2 = math.log(2)  # the gradient of a score whose weight is a power of two, for that of one whose weight is exp

# keys and values; in training keys are `Projected`, with a scale (h, 1) and angles (h, tokens of an image)
KeyValuePair = tuple[Any, Any]


class _KeySource(NamedTuple):
    """Keys and values (h, ...) that a tile of queries sees: the first `count` tiles of `side`, but what stands behind `length`."""

    k: Any
    v: Any
    side: int
    count: Any
    length: Any = None

    def at(self, j: Any) -> Any:
        return _tile_slice(j, self.side)

    def scores(self, j: Any, q: Array) -> Array:
        """Of the queries (h, queries) with the keys of a tile, (side, queries)."""
        found = _matmul(self.k[:, self.at(j)], q, (0, 0))
        if self.length is None:
            return found
        position = j * self.side + jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
        return jnp.where(position < self.length, found, _MASKED_SCORE)


def text_tile_size(words: int) -> int:
    """Keys in a tile of a text of so many tokens: a few, a class say, make no whole one."""
    return LANES if words > LANES // 2 else -(-words // _BFLOAT16_SUBLANES) * _BFLOAT16_SUBLANES


def _tile_slice(j: Any, side: int) -> Any:
    return pl.ds(j * side if isinstance(j, int) else pl.multiple_of(j * side, side), side)


def _for_each_tile(x: Any, side: int, function: Callable[[Any], None]) -> None:
    """Calls a function with the columns of each tile of x (h, n)."""
    side = math.gcd(side, x.shape[1])
    jax.lax.fori_loop(0, x.shape[1] // side, lambda j, _: function(_tile_slice(j, side)), None)


def _key_sources(
    keys: dict[str, KeyValuePair], numbers: Any, tokens: int, words: int, side: int
) -> dict[str, _KeySource]:
    """What the queries of this step see; `numbers` are the layer, the first block, and the length of each image's text."""
    tiles, text = tokens // side, text_tile_size(words)
    block = numbers[1] + jax.lax.div(pl.program_id(3), tiles)
    length = numbers[2 + pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]
    seen: dict[str, tuple[Any, ...]] = {
        "own": (side, tiles),
        "context": (side, (block + ("own" not in keys)) * tiles),
        "text": (text, jax.lax.div(length + LANES - 1, LANES) if text == LANES else 1, length),
    }
    return {kind: _KeySource(*pair, *seen[kind]) for kind, pair in keys.items()}


def _first_and_last_step(kind: str, tiles: int) -> tuple[Any, Any]:
    """Whether a step is the first, and the last, to see these keys; a block's own are seen by the tiles of it alone."""
    count = tiles if kind == "own" else pl.num_programs(3)
    step = jax.lax.rem(pl.program_id(3), count)
    return step == 0, step == count - 1


def _norm_rope_columns(x: Array, scale: Array, given: ProjectedQK, at: Any, factor: float = 1.0) -> Array:
    """QK-norm and RoPE of columns `at` (h, n) of a projection; `factor` comes on top of the scale."""
    return apply_qk_norm_rope(x, scale * factor, RotaryTable(*(angles[:, at] for angles in given.position)), axis=0)


def _scaled_queries(q: Any) -> Array:
    """Of a step, scaled for their scores."""
    if is_projected(q):
        return _norm_rope_columns(q.x[...], q.scale[...], q, pl.ds(0, q.x.shape[1]), _query_scale(len(q.x)))
    return (q[...].astype(jnp.float32) * _query_scale(len(q))).astype(q.dtype)


def _prepare_keys(
    keys: dict[str, KeyValuePair], room: dict[str, Any], tiles: int, side: int
) -> dict[str, KeyValuePair]:
    """Keys and values; those that are `Projected` are turned into keys in fast memory, at the first step that sees them."""
    for kind, place in room.items():
        first, _ = _first_and_last_step(kind, tiles)

        @pl.when(first)
        def _(given: ProjectedQK = keys[kind][0], place: Any = place) -> None:
            def one(at: Any) -> None:
                place[:, at] = _norm_rope_columns(given.x[:, at], given.scale[...], given, at)

            _for_each_tile(place, side, one)

    return {kind: (room.get(kind, k), v) for kind, (k, v) in keys.items()}


def _fold_tiles(count: Any, see: Callable[[Sequence[Any], Any], Any], state: Any) -> Any:
    """`see` of all tiles, so many at a time as go: while one is multiplied, the others' weights are taken."""
    if isinstance(count, int) and count == 1:  # whose place is known: a tile of any size may lie there
        return see([0], state)
    first: Any = 0
    for size in UNROLL_FACTORS:
        groups = jax.lax.div(count - first, size)

        def group(j: Any, state: Any, first: Any = first, size: int = size) -> Any:
            return see([first + size * j + n for n in range(size)], state)

        state = jax.lax.fori_loop(0, groups, group, state)
        first = first + size * groups
    return state


def _matmul(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of two matrices, summed over an axis of each."""
    return jax.lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())), preferred_element_type=jnp.float32)


def _query_scale(size: int) -> float:
    """Of queries, for scores whose weights are powers of two."""
    return size**-0.5 * math.log2(math.e)


def forward(
    numbers: Any,
    q: Any,
    keys: dict[str, KeyValuePair],
    out: Any,
    sums: Any,
    room: dict[str, Any],
    *,
    tokens: int,
    words: int,
) -> None:
    """One tile of queries, as flash attention: weights of 2 to the power of the scores, less the largest so far."""
    size, side = out.shape
    queries = _scaled_queries(q)
    keys = _prepare_keys(keys, room, tokens // side, side)
    state = (
        jnp.zeros((size, side), jnp.float32),
        jnp.full((1, side), _MASKED_SCORE, jnp.float32),
        jnp.zeros((1, side), jnp.float32),
    )

    for source in _key_sources(keys, numbers, tokens, words, side).values():

        def see(tiles: Sequence[Any], state: tuple[Array, ...], source: _KeySource = source) -> tuple[Array, ...]:
            weighted, top, total = state
            scores = [source.scores(j, queries) for j in tiles]
            new = functools.reduce(jnp.maximum, (x.max(axis=0, keepdims=True) for x in scores), top)
            old = jnp.exp2(top - new)
            weighted, total = weighted * old, total * old
            for j, x in zip(tiles, scores, strict=True):
                weights, v = jnp.exp2(x - new), source.v[:, source.at(j)]
                weighted += _matmul(v, weights.astype(v.dtype), (1, 0))
                total += weights.sum(axis=0, keepdims=True)
            return weighted, new, total

        state = _fold_tiles(source.count, see, state)
    weighted, top, total = state
    out[...] = (weighted / total).astype(out.dtype)
    sums[...] = top + jnp.log2(total)


def backward(
    numbers: Any,
    q: Any,
    keys: dict[str, KeyValuePair],
    out: Any,
    d_out: Any,
    sums: Any,
    dq: Any,
    d_keys: dict[str, Any],
    room: dict[str, Any],
    totals: dict[str, KeyValuePair],
    *,
    tokens: int,
    words: int,
) -> None:
    """One tile of queries; the gradients of keys and values are summed in fast memory until their last queries have come.

    d_keys["scales"] (h, n * 128) are the gradients of the scales of queries, and of keys in the order of their kinds' names, summed
    but for the lanes.
    """
    size, side = dq.shape
    tiles, gradient, logs = tokens // side, d_out[...], sums[...]
    mean = (out[...].astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=0, keepdims=True)

    if is_projected(q):
        d_scales = d_keys["scales"]

        @pl.when(pl.program_id(3) == 0)
        def _() -> None:
            d_scales[...] = jnp.zeros_like(d_scales)

    def pull(given: ProjectedQK, at: Any, factor: float, place: int, d_turned: Array) -> Array:
        """Gradient of the columns `at` of a projection, given that of what they were turned into."""
        x = given.x[:, at]
        scale = jnp.broadcast_to(given.scale[...], x.shape)
        _, back = jax.vjp(lambda x, scale: _norm_rope_columns(x, scale, given, at, factor), x, scale)
        dx, d_scale = back(d_turned.astype(x.dtype))
        lanes = d_scales.shape[1] // (1 + len(room))
        d_scales[:, pl.ds(place * lanes, lanes)] += sum(jnp.split(d_scale, side // lanes, axis=1))
        return dx

    queries = _scaled_queries(q)
    d_queries = jnp.zeros((size, side), jnp.float32)
    for kind, source in _key_sources(_prepare_keys(keys, room, tiles, side), numbers, tokens, words, side).items():
        dk, dv = totals[kind]
        first, last = _first_and_last_step(kind, tiles)

        @pl.when(first)
        def _(both: KeyValuePair = (dk, dv)) -> None:
            def clear(at: Any) -> None:
                for total in both:
                    total[:, at] = jnp.zeros_like(total[:, at])

            _for_each_tile(both[0], side, clear)

        def see(j: Sequence[Any], d_queries: Array, source: _KeySource = source, dk: Any = dk, dv: Any = dv) -> Array:
            columns = [source.at(n) for n in j]
            weights = [jnp.exp2(source.scores(n, queries) - logs) for n in j]
            before = [_matmul(source.v[:, at], gradient, (0, 0)) - mean for at in columns]
            d_scores = [(x * y).astype(queries.dtype) for x, y in zip(weights, before, strict=True)]
            for at, of_tile, d_tile in zip(columns, weights, d_scores, strict=True):
                dk[:, at] += _matmul(queries, d_tile, (1, 1))
                dv[:, at] += _matmul(gradient, of_tile.astype(queries.dtype), (1, 1))
                d_queries += _matmul(source.k[:, at], d_tile, (1, 0))
            return d_queries

        d_queries = _fold_tiles(source.count, see, d_queries)

        @pl.when(last)
        def _(kind: str = kind, dk: Any = dk, dv: Any = dv) -> None:
            dk_out, dv_out = d_keys[kind]

            def give(at: Any) -> None:
                dv_out[:, at] = dv[:, at].astype(dv_out.dtype)
                gradient = dk[:, at] * _LN_2
                if kind in room:
                    gradient = pull(keys[kind][0], at, 1.0, 1 + sorted(room).index(kind), gradient)
                dk_out[:, at] = gradient.astype(dk_out.dtype)

            _for_each_tile(dk, side, give)

    d_queries *= _LN_2
    scaled = (
        pull(q, pl.ds(0, side), _query_scale(size), 0, d_queries) if is_projected(q) else d_queries * _query_scale(size)
    )
    dq[...] = scaled.astype(dq.dtype)
