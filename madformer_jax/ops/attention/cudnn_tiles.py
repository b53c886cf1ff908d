"""Tiles of the block-causal triangle in descending order of blocks, as cuDNN reads them (section 3.2).

In a pair of runs of m blocks, the second run attends to the first. With descending blocks, the second
run is in front of the first, in one row of memory. A call of cuDNN reads such rows in place and takes
the number of queries in front. Queries, outputs and their gradients are thus not copied. Keys are.

If L is not a power of two, some tiles do not cover all blocks. These are copied.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from madformer_jax.ops.attention.tiling import Tile, tiling


class DescendingTile(NamedTuple):
    """A `Tile` of arrays with all blocks in descending order.

    The methods are those of `Tile`. Rows are groups, in the same order in all results.
    """

    tile: Tile
    in_place: bool

    def queries(self, x: Shaped[Array, "B L s *rest"]) -> Shaped[Array, "rows _ *rest"]:
        """Returns rows that begin with the query blocks, see `query_count`."""
        if not self.in_place:
            return self.tile.queries(x[:, ::-1])
        return x.reshape(x.shape[0] * self.tile.groups, -1, *x.shape[3:])

    def query_count(self, x: Shaped[Array, "B L s *rest"]) -> int | None:
        """Returns the number of leading tokens of a row of `queries` that are queries. None for all."""
        return self.tile.query_blocks * x.shape[2] if self.in_place else None

    def keys(self, x: Shaped[Array, "B L s *rest"]) -> Shaped[Array, "rows _ *rest"]:
        """Returns the key blocks, those of each group in one row."""
        if not self.in_place:
            return self.tile.keys(x[:, ::-1])
        keys = self._halves(x)[:, :, 1]
        return keys.reshape(keys.shape[0] * keys.shape[1], -1, *x.shape[3:])

    def put_queries(
        self, values: Shaped[Array, "rows _ *rest"], like: Shaped[Array, "*shape"], fill: float = 0.0
    ) -> Shaped[Array, "*shape"]:
        """Inverts `queries`: returns an array shaped like `like` that is `fill` where there is no query."""
        if not self.in_place:
            return self.tile.put_queries(values, like, fill)[:, ::-1]
        return self._put(self._halves(values.reshape(like.shape))[:, :, :1], like, (0, 1), fill)

    def put_keys(self, values: Shaped[Array, "rows _ *rest"], like: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """Inverts `keys`: returns an array shaped like `like` that is zero elsewhere."""
        if not self.in_place:
            return self.tile.put_keys(values, like)[:, ::-1]
        keys = values.reshape(like.shape[0], self.tile.groups, 1, self.tile.key_blocks, *like.shape[2:])
        return self._put(keys, like, (1, 0), 0.0)

    def _halves(self, x: Shaped[Array, "B L s *rest"]) -> Shaped[Array, "B groups 2 m s *rest"]:
        return x.reshape(x.shape[0], self.tile.groups, 2, self.tile.key_blocks, *x.shape[2:])

    def _put(
        self,
        half: Shaped[Array, "B groups 1 m s *rest"],
        like: Shaped[Array, "*shape"],
        padding: tuple[int, int],
        fill: float,
    ) -> Shaped[Array, "*shape"]:
        widths = [(0, 0), (0, 0), padding, *[(0, 0)] * (half.ndim - 3)]
        return jnp.pad(half, widths, constant_values=fill).reshape(like.shape)


def descending_tiles(blocks: int) -> list[DescendingTile]:
    """Returns the tiles of `tiling` for blocks in descending order."""
    return [
        DescendingTile(tile, tile.key_blocks == tile.query_blocks and 2 * tile.key_blocks * tile.groups == blocks)
        for tile in tiling(blocks)
    ]
