"""The triangle of the context blocks before each block, in squares: attentions that need no mask (MADFormer, section 3.2)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Tile(NamedTuple):
    """In each of `pairs` behind block `start`, `rows` blocks see all of the `size` blocks before them."""

    start: int
    pairs: int
    size: int
    rows: int

    def _in_pairs(self, x: Array) -> Array:
        """(B, blocks, ...) -> (B, pairs, size + rows, ...)."""
        side = self.size + self.rows
        x = x[:, self.start : self.start + self.pairs * side]
        return x.reshape(x.shape[0], self.pairs, side, *x.shape[2:])

    def keys(self, x: Array) -> Array:
        """Of (B, blocks, s, H, h) what is seen, (B pairs, size s, H, h)."""
        return _flatten_tokens(self._in_pairs(x)[:, :, : self.size])

    def queries(self, x: Array) -> Array:
        """Of (B, blocks, s, H, ...) what sees it, (B pairs, rows s, H, ...)."""
        return _flatten_tokens(self._in_pairs(x)[:, :, self.size :])

    def put_keys(self, part: Array, x: Array) -> Array:
        """The inverse of `keys`: an array like x, zero elsewhere."""
        return self._put(part, x, self.size, (0, self.rows), 0.0)

    def put_queries(self, part: Array, x: Array, fill: float = 0.0) -> Array:
        """The inverse of `queries`: an array of x's shape and the part's type, `fill` elsewhere."""
        return self._put(part, x, self.rows, (self.size, 0), fill)

    def _put(self, part: Array, x: Array, blocks: int, beside: tuple[int, int], fill: float) -> Array:
        rest = [(0, 0)] * (x.ndim - 2)
        part = part.reshape(x.shape[0], self.pairs, blocks, *x.shape[2:])
        part = jnp.pad(part, [(0, 0), (0, 0), beside, *rest], constant_values=fill)
        part = part.reshape(x.shape[0], -1, *x.shape[2:])
        behind = x.shape[1] - self.start - part.shape[1]
        return jnp.pad(part, [(0, 0), (self.start, behind), *rest], constant_values=fill)


def _flatten_tokens(x: Array) -> Array:
    """(B, count, blocks, s, ...) -> (B count, blocks s, ...)."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], *x.shape[4:])


def tiling(blocks: int) -> list[Tile]:
    """What makes up the triangle of all j < i: every pair of blocks (i, j) lies in one of them."""
    found, size = [], 1
    while size < blocks:
        pairs, rest = divmod(blocks, 2 * size)
        found += [Tile(0, pairs, size, size)] if pairs else []
        found += [Tile(2 * size * pairs, 1, size, rest - size)] if rest > size else []
        size *= 2
    return found
