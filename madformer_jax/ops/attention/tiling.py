"""Tiling of the block-causal triangle into rectangles that need no mask (section 3.2).

Query block i attends to the context blocks j < i. `tiling` cuts all these pairs (i, j) into tiles in
which every query block attends to every key block. `attention.xla_blocks` and `attention.cudnn` compute
one unmasked attention per tile and merge the results.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped


class Tile(NamedTuple):
    """`groups` adjacent groups of `key_blocks + query_blocks` blocks each, from block `start` on.

    In each group, the last `query_blocks` blocks attend to all of the first `key_blocks` blocks.
    """

    start: int
    groups: int
    key_blocks: int
    query_blocks: int

    def _groups(self, x: Shaped[Array, "B L *rest"]) -> Shaped[Array, "B groups side *rest"]:
        """Reshapes blocks to groups of side = key_blocks + query_blocks blocks."""
        side = self.key_blocks + self.query_blocks
        x = x[:, self.start : self.start + self.groups * side]
        return x.reshape(x.shape[0], self.groups, side, *x.shape[2:])

    def keys(self, x: Shaped[Array, "B L s *rest"]) -> Shaped[Array, "B*{self.groups} {self.key_blocks}*s *rest"]:
        """Selects the key blocks, those of each group in one row."""
        return _flatten_tokens(self._groups(x)[:, :, : self.key_blocks])

    def queries(self, x: Shaped[Array, "B L s *rest"]) -> Shaped[Array, "B*{self.groups} {self.query_blocks}*s *rest"]:
        """Selects the query blocks, those of each group in one row."""
        return _flatten_tokens(self._groups(x)[:, :, self.key_blocks :])

    def put_keys(self, values: Shaped[Array, "_ _ *rest"], like: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """Inverts `keys`: returns an array shaped like `like` that is zero elsewhere."""
        return self._put(values, like, self.key_blocks, (0, self.query_blocks), 0.0)

    def put_queries(
        self, values: Shaped[Array, "_ _ *rest"], like: Shaped[Array, "*shape"], fill: float = 0.0
    ) -> Shaped[Array, "*shape"]:
        """Inverts `queries`: returns an array shaped like `like` that is `fill` elsewhere."""
        return self._put(values, like, self.query_blocks, (self.key_blocks, 0), fill)

    def _put(
        self,
        values: Shaped[Array, "_ _ *rest"],
        like: Shaped[Array, "*shape"],
        blocks: int,
        padding: tuple[int, int],
        fill: float,
    ) -> Shaped[Array, "*shape"]:
        rest = [(0, 0)] * (like.ndim - 2)
        x = values.reshape(like.shape[0], self.groups, blocks, *like.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), padding, *rest], constant_values=fill)
        x = x.reshape(like.shape[0], -1, *like.shape[2:])
        remaining = like.shape[1] - self.start - x.shape[1]
        return jnp.pad(x, [(0, 0), (self.start, remaining), *rest], constant_values=fill)


def _flatten_tokens(x: Shaped[Array, "B groups blocks s *rest"]) -> Shaped[Array, "B*groups blocks*s *rest"]:
    """Joins the blocks of each group in one row."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], *x.shape[4:])


def tiling(blocks: int) -> list[Tile]:
    """Returns tiles that hold every pair of blocks (i, j) with j < i exactly once."""
    tiles, size = [], 1
    while size < blocks:
        pairs, rest = divmod(blocks, 2 * size)
        tiles += [Tile(0, pairs, size, size)] if pairs else []
        tiles += [Tile(2 * size * pairs, 1, size, rest - size)] if rest > size else []
        size *= 2
    return tiles
