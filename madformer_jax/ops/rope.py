"""2-D rotary position embedding (RoPE): the release's variant and the axial one (section 3.3).

`models.madformer` builds the tables. `attention.qk_norm_rope` applies them to queries and keys. Add
a variant in `rotary_table` and to the choices of `config.model.rope`.

Shapes: L blocks, s tokens a block, T text tokens, h head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int


class RotaryTable(NamedTuple):
    """Cosines and sines of the rotation angles of a set of positions."""

    cos: Float[Array, "... h"]
    sin: Float[Array, "... h"]


def image_positions(grid: int, token_side: int, columns: int) -> tuple[Int[np.ndarray, "L s"], Int[np.ndarray, "L s"]]:
    """Returns the rows and columns of all tokens on the token grid of an image.

    Blocks are in raster order, and so are the tokens within a block. The image is square.

    Args:
      grid: Rows of blocks.
      token_side: Rows of tokens in a block.
      columns: Columns of blocks.

    Returns:
      Rows and columns, each `(L, s)`.
    """
    token_width = token_side * grid // columns
    row, col = np.divmod(np.arange(token_side * token_width), token_width)
    block_row, block_col = np.divmod(np.arange(grid * columns), columns)
    return block_row[:, None] * token_side + row, block_col[:, None] * token_width + col


def text_positions(length: int) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Returns the rows and columns of text tokens, each `(T,)`.

    Text lies on the diagonal that ends at the first corner of the image, at -T..-1.
    """
    return np.arange(-length, 0), np.arange(-length, 0)


def rotary_table(
    rows: Int[np.ndarray, "*positions"],
    cols: Int[np.ndarray, "*positions"],
    *,
    head_size: int,
    side: int,
    variant: str,
) -> RotaryTable:
    """Computes the rotary table of token positions on a grid of `side` x `side` tokens.

    `release` has h / 4 frequencies b ** -(linspace(0, h, h / 4) / h) with the base
    b = (floor(8 side / pi) // 100 + 1) * 100, and orders its angles as rows, rows, columns,
    columns. `axial` orders the same angles as rows, columns, rows, columns. A dimension and its
    partner, h / 2 further, then have the same angle, which makes each pair a true rotation.
    """
    base = (math.floor(8 * side / math.pi) // 100 + 1) * 100
    frequencies = float(base) ** -(np.linspace(0, head_size, head_size // 4) / head_size)
    row, col = rows[..., None] * frequencies, cols[..., None] * frequencies
    order = (row, row, col, col) if variant == "release" else (row, col, row, col)
    angles = np.concatenate(order, axis=-1)
    return RotaryTable(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))


def apply_rope_by_reversal(x: Float[Array, "*shape h"], position: RotaryTable) -> Float[Array, "*shape h"]:
    """Computes `apply_rope` along the last axis in the form for GPUs, in float32.

    It exchanges the halves by a reversal, not by a concatenation. XLA can then compute a gradient and
    the sums over it in one kernel. A TPU would copy the reversed array.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    exchanged = jax.lax.rev(halves, (halves.ndim - 2,)).reshape(x.shape)
    sin_a, sin_b = jnp.split(position.sin, 2, axis=-1)
    return x.astype(jnp.float32) * position.cos + exchanged * jnp.concatenate([-sin_a, sin_b], axis=-1)


def apply_rope(
    x: Float[Array, "*shape"], position: RotaryTable, axis: int = -1, dtype: DTypeLike | None = None
) -> Float[Array, "*shape"]:
    """Computes x * cos + rotate_half(x) * sin along an axis, in float32.

    Args:
      x: Queries or keys, whose `axis` has size h.
      position: Table that broadcasts against `x`.
      axis: Axis of the head dimensions.
      dtype: Type of the result, by default that of `x`.
    """
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        jax.lax.split(y.astype(jnp.float32), [y.shape[axis] // 2] * 2, axis=axis % y.ndim) for y in (x, *position)
    )
    # Each half is rounded before they are joined. Joining them in float32 would double the memory
    # that a TPU writes and reads again.
    halves = (y.astype(dtype or x.dtype) for y in (a * cos_a - b * sin_a, b * cos_b + a * sin_b))
    return jnp.concatenate(tuple(halves), axis=axis)
