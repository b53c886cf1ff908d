"""From a projection to queries or keys: QK-norm and RoPE (MADFormer, section 3.3)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.ops.rope import RotaryTable, apply_rope

QK_NORM_EPS = 1e-6


class ProjectedQK(NamedTuple):
    """Queries or keys to be, which the kernels of a TPU turn into them where they read them."""

    x: Array  # (B, blocks, s, H, h), or (B, T, H, h) of the text; of some images in a row, all their blocks
    scale: Array  # (h,), of QK-norm
    position: RotaryTable  # of one image, (blocks, s, h) or (T, h)


def apply_to_tree(tree: Any) -> Any:
    """Every `Projected` in a tree as the queries or keys that it gives."""
    return jax.tree.map(_apply_to_leaf, tree, is_leaf=is_projected)


def is_projected(given: Any) -> bool:
    return isinstance(given, ProjectedQK)


def _apply_to_leaf(given: Any) -> Any:
    if not is_projected(given):
        return given
    x, scale, position = given
    rows = x.reshape(len(x), -1, *x.shape[-2:])  # as one axis: on a TPU each more is a copy
    angles = (y.reshape(-1, y.shape[-1]) for y in position)
    at = RotaryTable(*(jnp.tile(y, (rows.shape[1] // len(y), 1))[:, None] for y in angles))
    return apply_qk_norm_rope(rows, scale, at).reshape(x.shape)


def apply_qk_norm_rope(x: Array, scale: Array, position: RotaryTable, axis: int = -1) -> Array:
    """QK-norm over `axis`, then RoPE, of scales and angles that broadcast against x; computed in float32, rounded once."""
    y = x.astype(jnp.float32)
    unit = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis, keepdims=True) + QK_NORM_EPS)
    return apply_rope(unit * scale.astype(jnp.float32), position, axis, x.dtype)
