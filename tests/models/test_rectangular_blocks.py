"""Blocks for L = 8 (Table 2): 2 rows of 4 blocks that are twice as high as wide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from madformer_jax.config import schema
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops
from madformer_jax.diffusion import losses
from madformer_jax.models import madformer
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


def test_flops_of_rectangular_blocks_equal_xla():
    c = tiny.get_config()
    c.model.blocks, c.model.classes, c.sample.guidance, c.codec.patch = 8, 0, 1.0, 1
    c.model.unet_channels, c.model.unet_attention = (8, 16), (False, True)
    c.model.depth, c.model.diffusion_depth = 2, 1  # no scan, because XLA counts its body once
    model, sizes = madformer.build(c), derive_sizes(c)
    params = nn.meta.unbox(jax.eval_shape(functools.partial(madformer.init, model), jax.random.key(0)))
    z = jax.ShapeDtypeStruct((2, *sizes.block_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    forward = jax.jit(lambda p, z, t: model.apply({"params": p}, z, z, t, terms=losses.LossWeights(**c.loss).terms))
    counted = forward.lower(params, z, t).cost_analysis()["flops"]
    # XLA counts element-wise work too.
    assert abs(counted / (2 * flops.forward_pass(c)[0].total) - 1) < 0.2, counted
