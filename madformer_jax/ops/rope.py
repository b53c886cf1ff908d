"""2-D rotary position embedding: the release's variant and the axial one (MADFormer, section 3.3)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class RotaryTable(NamedTuple):
    """Cosine and sine for a set of positions, each (..., head size)."""

    cos: Array
    sin: Array


def image_positions(grid: int, token_side: int, columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all tokens on the image's token grid, each (L, s): blocks in raster order, tokens likewise.

    The grid has `grid` rows and `columns` (by default as many) columns of blocks, which together are square.
    """
    columns = columns or grid
    token_width = token_side * grid // columns
    row, col = np.divmod(np.arange(token_side * token_width), token_width)
    block_row, block_col = np.divmod(np.arange(grid * columns), columns)
    return block_row[:, None] * token_side + row, block_col[:, None] * token_width + col


def text_positions(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of text tokens, each (T,): on the diagonal before the image's first corner."""
    return np.arange(-length, 0), np.arange(-length, 0)


def rotary_table(rows: np.ndarray, cols: np.ndarray, *, head_size: int, side: int, variant: str) -> RotaryTable:
    """Cosines and sines of the angles of positions (rows, cols) on a token grid of `side` x `side`.

    `release`: base b = (floor(8 side / pi) // 100 + 1) * 100, head_size / 4 frequencies b ** -(linspace(0, h, h/4) / h);
    angles are [rows twice, columns twice]. `axial` orders the same angles so that a dimension and its partner
    h/2 further turn by the same angle, which makes each pair a true rotation.
    """
    base = (math.floor(8 * side / math.pi) // 100 + 1) * 100
    frequencies = float(base) ** -(np.linspace(0, head_size, head_size // 4) / head_size)
    row, col = rows[..., None] * frequencies, cols[..., None] * frequencies
    order = (row, row, col, col) if variant == "release" else (row, col, row, col)
    angles = np.concatenate(order, axis=-1)
    return RotaryTable(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))


def apply_rope(x: Array, position: RotaryTable, axis: int = -1, dtype: Any = None) -> Array:
    """X * cos + rotate_half(x) * sin over `axis`, for angles that broadcast against x; computed in float32, by default given as x."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        jax.lax.split(y.astype(jnp.float32), [y.shape[axis] // 2] * 2, axis=axis % y.ndim) for y in (x, *position)
    )
    # each half rounded by itself: joined in float32, they are twice what a TPU writes and reads again
    halves = (y.astype(dtype or x.dtype) for y in (a * cos_a - b * sin_a, b * cos_b + a * sin_b))
    return jnp.concatenate(tuple(halves), axis=axis)
