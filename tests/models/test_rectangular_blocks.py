"""Blocks for L = 8 (Table 2): 2 rows of 4 blocks that are twice as high as wide."""

import numpy as np

from madformer_jax.config import schema
from madformer_jax.ops import rope
from madformer_jax.sampling import codec
from tests import tiny


def test_eight_blocks_tile_a_square_in_raster_order():
    c = tiny.get_config()
    c.model.blocks = 8
    sizes = schema.validate(c)
    assert (sizes.grid, sizes.columns, sizes.block_side, sizes.block_width, sizes.tokens) == (2, 4, 4, 2, 8)
    z = np.arange(2 * 8 * 8).reshape(2, 8, 8, 1)
    blocks = codec.to_blocks(z, sizes)
    np.testing.assert_array_equal(blocks[1, 5, :, 0], z[1, 4:8, 2:4, 0].ravel())  # second row, second column
    np.testing.assert_array_equal(codec.from_blocks(blocks, sizes), z)
    rows, cols = rope.image_positions(2, 4, 4)
    np.testing.assert_array_equal(codec.to_blocks(np.indices((8, 8)).transpose(1, 2, 0)[None], sizes)[0, ..., 0], rows)
    np.testing.assert_array_equal(codec.to_blocks(np.indices((8, 8)).transpose(1, 2, 0)[None], sizes)[0, ..., 1], cols)
