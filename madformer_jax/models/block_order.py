"""Generation orders of the blocks of a batch: random orders, and permutations of arrays.

The model's axis L is in the order of generation. Block r of this axis has rank r. `order[r]` is the
number of this block, which counts blocks in raster order. `diffusion.losses` and `sampling.generation` choose the
orders, and `models.madformer` reads them for the positions. `config.block_orders` has the fixed
orders by name. Shapes use the letters of the legend in `models.madformer`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Shaped

from madformer_jax.config.block_orders import fixed_order
from madformer_jax.config.shapes import Sizes

Order = Int[Array | np.ndarray, " L"] | Int[Array | np.ndarray, "B L"]  # of all images, or of each

ORDER_STREAM = 1 << 31  # folded into the key of an image; solvers fold in block numbers, which are smaller


def image_orders(name: str, sizes: Sizes, keys: Shaped[Array, " B"]) -> Order | None:
    """Returns the order of each image.

    Args:
      name: A name of `choices.BLOCK_ORDERS`, or a list of block numbers.
      sizes: The sizes of the model.
      keys: Random key of each image.

    Returns:
      One fixed order (L,), or for "random" an order of each image (B, L). None is raster order.
    """
    fixed = fixed_order(name, sizes)
    if fixed is not None:
        return None if name == "raster" else fixed
    return jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, ORDER_STREAM), sizes.blocks))(keys)


def move_to_front(order: Order, numbers: Int[Array, " K"]) -> Order:
    """Moves blocks to the front of an order.

    Args:
      order: The order.
      numbers: Numbers of K blocks, in their new order. The other blocks follow as in `order`.
    """

    def of_image(order: Array) -> Array:
        return jnp.argsort(jnp.argsort(order).at[numbers].set(jnp.arange(len(numbers)) - len(numbers)))

    order = jnp.asarray(order)
    return jax.vmap(of_image)(order) if order.ndim == 2 else of_image(order)


def to_generation_order(blocks: Shaped[Array, "B L *rest"], order: Order | None) -> Shaped[Array, "B L *rest"]:
    """Permutes blocks from raster order to the order of generation."""
    if order is None:
        return blocks
    if order.ndim == 1:
        return jnp.take(blocks, order, axis=1)
    return jnp.take_along_axis(blocks, order.reshape(*order.shape, *(1,) * (blocks.ndim - 2)), axis=1)


def to_raster_order(blocks: Shaped[Array, "B L *rest"], order: Order | None) -> Shaped[Array, "B L *rest"]:
    """Permutes blocks from the order of generation to raster order; the inverse of `to_generation_order`."""
    return blocks if order is None else to_generation_order(blocks, jnp.argsort(order, axis=-1))
