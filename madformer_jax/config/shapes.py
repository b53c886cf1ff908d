"""Sizes of the latent, its blocks and their tokens, derived from a config (MADFormer, Section 2).

`schema.validate`, the models, the codecs and the cost estimates call `derive_sizes`.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError


class Sizes(NamedTuple):
    """Sizes that follow from a config, computed by `derive_sizes`."""

    latent: int  # side of the latent, in positions
    channels: int  # C, channels of the latent
    blocks: int  # L
    grid: int  # rows of blocks: sqrt(L); sqrt(L / 2) if L is twice a square; L if `model.block_shape` is "rows"
    block_side: int  # latent positions along a block's height
    positions: int  # latent positions in a block
    token_side: int  # tokens along a block's height
    tokens: int  # s, tokens in a block

    @property
    def columns(self) -> int:
        """Number of blocks along the width of the image."""
        return self.blocks // self.grid

    @property
    def block_width(self) -> int:
        """Number of latent positions along the width of a block."""
        return self.positions // self.block_side

    @property
    def token_width(self) -> int:
        """Number of tokens along the width of a block."""
        return self.tokens // self.token_side

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape (L, positions, C) of one image as latent blocks."""
        return self.blocks, self.positions, self.channels


SCALING_FACTOR = 0.18215  # of Stable Diffusion's VAE: makes the latents' variance about 1


def vocabulary_size(c: ConfigDict) -> int:
    """Returns the number of condition tokens of the model; 0 for an unconditional model.

    They are the classes or the tokens of the tokenizer, and a last token that stands for no condition.
    """
    known: int = c.text.vocabulary or c.model.classes
    return known + 1 if known else 0


def derive_sizes(c: ConfigDict) -> Sizes:
    """Derives the sizes of a config.

    Raises:
      ConfigError: Image, latent, blocks and U-Net stride do not divide one another.
    """
    m, side = c.model, c.data.image_size
    if c.codec.name == "pixel":
        reduction, channels = c.codec.patch, c.data.channels * c.codec.patch**2
    else:
        reduction, channels = c.codec.downsampling, c.codec.latent_channels
    if side < 1 or reduction < 1 or side % reduction:
        raise ConfigError(
            f"config.data.image_size={side} is not a multiple of {reduction}, the {c.codec.name} codec's reduction."
        )
    latent = side // reduction
    grid, columns = (_row_grid if m.block_shape == "rows" else _square_grid)(m.blocks, latent)
    block_side, block_width = latent // grid, latent // columns
    reduction = m.unet_stride ** (len(m.unet_channels) - 1)
    if block_width % reduction or block_side % reduction:
        raise ConfigError(
            f"a block of {block_side} x {block_width} latent positions is not divisible by the block U-Net's reduction of "
            f"{reduction}: use fewer config.model.blocks or config.model.unet_stride=1."
        )
    positions, token_side = block_side * block_width, block_side // reduction
    return Sizes(latent, channels, m.blocks, grid, block_side, positions, token_side, positions // reduction**2)


def _row_grid(blocks: int, latent: int) -> tuple[int, int]:
    """Returns the rows and columns of blocks that are rows of the image.

    Raises:
      ConfigError: Blocks do not divide the side of the latent.
    """
    if blocks < 1 or latent % blocks:
        divisors = [n for n in range(1, latent + 1) if latent % n == 0]
        raise ConfigError(
            f"config.model.blocks={blocks} rows do not divide the {latent} rows of the latent: use one of "
            f"{', '.join(map(str, divisors))}."
        )
    return blocks, 1


def _square_grid(blocks: int, latent: int) -> tuple[int, int]:
    """Returns the rows and columns of blocks that tile the latent as n x n or n x 2n.

    The second is how the paper's L = 8 can tile a square.

    Raises:
      ConfigError: Blocks do not tile the latent.
    """
    grid = math.isqrt(max(blocks, 0))
    grid = grid if grid**2 == blocks else math.isqrt(max(blocks, 0) // 2)
    columns = blocks // grid if grid else 0
    if grid < 1 or columns not in (grid, 2 * grid) or grid * columns != blocks or latent % columns:
        tilings = sorted(n * k for n in range(1, latent + 1) for k in (n, 2 * n) if latent % k == 0)
        raise ConfigError(
            f"config.model.blocks={blocks} does not tile a {latent} x {latent} latent: blocks must be a square number, or "
            f"twice one, with a number of columns that divides {latent} ({', '.join(map(str, tilings))})."
        )
    return grid, columns
