"""Named and explicit orders in which the blocks of an image are generated.

An order lists block numbers in the order of generation. Blocks are numbered in raster order: (3, 0,
1, 2) generates the last block first. `models.block_order` draws random orders and permutes arrays. `validation` checks the
fields `model.block_order` and `sample.block_order`. Add a fixed order in `fixed_order` and to
`BLOCK_ORDERS` in `config.choices`.
"""

import re

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config.choices import BLOCK_ORDERS
from madformer_jax.config.shapes import Sizes, derive_sizes
from madformer_jax.errors import ConfigError


def fixed_order(name: str, sizes: Sizes) -> np.ndarray | None:
    """Returns an order (L,) by its name or its list of block numbers; None for "random".

    `center_out` sorts the blocks by the distance of their centers from that of the image. Ties are
    in raster order.
    """
    numbers = np.arange(sizes.blocks)
    if name == "random":
        return None
    if name == "raster":
        return numbers
    if name == "reverse":
        return numbers[::-1].copy()
    if name == "center_out":
        row, column = np.divmod(numbers, sizes.columns)
        # Distances in half latent positions, which are whole numbers.
        down = (2 * row + 1 - sizes.grid) * sizes.block_side
        right = (2 * column + 1 - sizes.columns) * sizes.block_width
        return np.argsort(down**2 + right**2, kind="stable")
    return np.array([int(number) for number in name.split(",")])


def sampling_order_name(c: ConfigDict) -> str:
    """Returns the name or list of the order of sampling.

    A model of fixed order keeps `model.block_order`. `sample.block_order` may only name the same order.
    """
    chosen = c.sample.block_order if c.model.block_order == "random" else ""
    name: str = chosen or c.model.block_order
    return name


def parse_block_numbers(field: str, text: str, blocks: int) -> list[int]:
    """Returns the block numbers in a text such as "3,0,1".

    Args:
      field: The setting and its value, for the message.
      text: The text.
      blocks: L, the number of blocks.

    Raises:
      ConfigError: A number is not a block, or occurs twice.
    """
    numbers = [int(x) if re.fullmatch(r"\s*\d{1,9}\s*", x) else -1 for x in text.split(",")]
    if wrong := [x for x, number in zip(text.split(","), numbers) if not 0 <= number < blocks]:
        raise ConfigError(f"{field}: {wrong[0].strip()!r} is not a block: blocks have the numbers 0 to {blocks - 1}.")
    if twice := {number for number in numbers if numbers.count(number) > 1}:
        raise ConfigError(f"{field}: block {min(twice)} occurs twice.")
    return numbers


def check(c: ConfigDict) -> None:
    """Checks the orders of the model and of sampling.

    Raises:
      ConfigError: `sample.block_order` is not an order, or the model was not trained with it.
    """
    name, model_name = c.sample.block_order, c.model.block_order
    if not name:
        return
    sizes = derive_sizes(c)
    field = f"config.sample.block_order={name!r}"
    if name not in BLOCK_ORDERS:
        if not any(character.isdecimal() for character in name):
            raise ConfigError(
                f"{field} is unknown: one of {', '.join(BLOCK_ORDERS)}, or the {sizes.blocks} block numbers in any order."
            )
        numbers = parse_block_numbers(field, name, sizes.blocks)
        if len(numbers) != sizes.blocks:
            raise ConfigError(f"{field} has {len(numbers)} of {sizes.blocks} blocks: list each block once.")
    model_order, sampling_order = fixed_order(model_name, sizes), fixed_order(name, sizes)
    if model_order is not None and (sampling_order is None or not np.array_equal(model_order, sampling_order)):
        raise ConfigError(
            f"{field}: the model generates its blocks in the order config.model.block_order={model_name!r} only. Train with "
            "config.model.block_order=random for other orders."
        )
