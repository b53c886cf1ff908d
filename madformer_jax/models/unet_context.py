"""Values of finished blocks beside a block, which its U-Net reads if `model.unet_context` is on.

This is not in the paper. `madformer.MADFormer` computes the context of all blocks in training, and
`decoding.Decoding` that of one block in sampling. Shapes use the letters of the legend in
`models.madformer`.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from madformer_jax.config.shapes import Sizes
from madformer_jax.models import block_order
from madformer_jax.models.block_order import Order


def neighbor_context(
    z: Float[Array, "B L positions C"], order: Order | None, sizes: Sizes
) -> Float[Array, "B L positions _"]:
    """Returns the values of other blocks left of and above each position.

    The first column and row of each block get the adjacent values of the blocks left of and
    above it. Both blocks come earlier in raster order. At all other positions, and at the
    border of the image, the values are 0.

    With an explicit order, the last column and row also get the values of the blocks right of and
    below the block. Blocks that are generated later have the value 0.

    Args:
      z: All blocks of an image.
      order: Number of each block; None for raster order.
      sizes: The sizes of the model.

    Returns:
      The left neighbors, then those above. With an order, those right and below follow.
    """
    grid = len(z), sizes.grid, sizes.columns, sizes.block_side, sizes.block_width
    blocks = block_order.to_raster_order(z, order).reshape(*grid, sizes.channels)
    left = jnp.zeros_like(blocks).at[:, :, 1:, :, 0].set(blocks[:, :, :-1, :, -1])
    above = jnp.zeros_like(blocks).at[:, 1:, :, 0].set(blocks[:, :-1, :, -1])
    if order is None:
        return jnp.concatenate([left, above], axis=-1).reshape(*z.shape[:3], -1)
    right = jnp.zeros_like(blocks).at[:, :, :-1, :, -1].set(blocks[:, :, 1:, :, 0])
    below = jnp.zeros_like(blocks).at[:, :-1, :, -1].set(blocks[:, 1:, :, 0])
    block_ranks = jnp.broadcast_to(jnp.argsort(order, axis=-1), z.shape[:2]).reshape(grid[:3])
    padded_ranks = jnp.pad(block_ranks, ((0, 0), (1, 1), (1, 1)), constant_values=sizes.blocks)
    neighbors = (
        padded_ranks[:, 1:-1, :-2],
        padded_ranks[:, :-2, 1:-1],
        padded_ranks[:, 1:-1, 2:],
        padded_ranks[:, 2:, 1:-1],
    )
    sides = [
        jnp.where((rank < block_ranks)[..., None, None, None], side, 0)
        for rank, side in zip(neighbors, (left, above, right, below), strict=True)
    ]
    return block_order.to_generation_order(jnp.concatenate(sides, axis=-1).reshape(*z.shape[:3], -1), order)
