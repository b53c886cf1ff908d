"""QK-norm and RoPE, which turn projections into queries and keys (section 3.3).

`models.transformer` passes queries and keys to attention as `ProjectedQK`. The TPU kernels apply
QK-norm and RoPE where they read a projection. `attention.cudnn` applies them with the kernels of
`attention.qk_kernels` where sizes allow. All other implementations call `apply_to_tree` first.
"""

from functools import partial
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from madformer_jax.ops.rope import RotaryTable, apply_rope, apply_rope_by_reversal

QK_NORM_EPS = 1e-6
_Tree = TypeVar("_Tree")


class ProjectedQK(NamedTuple):
    """Projected queries or keys before QK-norm and RoPE.

    Attributes:
      x: Projection, `(B, L, s, H, h)` of an image stream or `(B, T, H, h)` of the text. If a row
        holds several images, the blocks of all of them are along L.
      scale: QK-norm scale.
      position: Rotary table of one image, `(L, s, h)`, of the text, `(T, h)`, or of each image,
        `(images, L, s, h)`, which only `apply_to_tree` supports.
      bias: Bias that `x` lacks, or None. Only an attention with `adds_bias` gets one.
    """

    x: Float[Array, "B *tokens H h"]
    scale: Float[Array, " h"]
    position: RotaryTable
    bias: Float[Array, "H h"] | None = None


Projectable = Any  # an array or a `ProjectedQK`; within a TPU kernel, of `jax.Ref`s


def apply_to_tree(tree: _Tree, store_norms: bool = False) -> _Tree:
    """Replaces every `ProjectedQK` in a tree with its queries or keys.

    Args:
      tree: The tree.
      store_norms: See `apply_qk_norm_rope`.
    """
    return jax.tree.map(partial(_apply_to_leaf, store_norms=store_norms), tree, is_leaf=is_projected)


def is_projected(x: PyTree) -> TypeGuard[ProjectedQK]:
    """Returns whether `x` is a `ProjectedQK`, as a predicate for tree leaves."""
    return isinstance(x, ProjectedQK)


def _apply_to_leaf(leaf: PyTree, store_norms: bool) -> PyTree:
    if not is_projected(leaf):
        return leaf
    x, scale, position, bias = leaf
    x = x if bias is None else x + bias
    rows = x.reshape(len(x), -1, *x.shape[-2:])  # one token axis: on a TPU each further axis is a copy
    if position.cos.ndim == 4:
        table = RotaryTable(*(y.reshape(*rows.shape[:2], 1, -1) for y in position))
        return apply_qk_norm_rope(rows, scale, table).reshape(x.shape)
    angles = (y.reshape(-1, y.shape[-1]) for y in position)
    tiled = RotaryTable(*(jnp.tile(y, (rows.shape[1] // len(y), 1))[:, None] for y in angles))
    return apply_qk_norm_rope(rows, scale, tiled, store_norms=store_norms).reshape(x.shape)


def apply_qk_norm_rope(
    x: Float[Array, "*shape"],
    scale: Float[Array, "..."],
    position: RotaryTable,
    axis: int = -1,
    store_norms: bool = False,
) -> Float[Array, "*shape"]:
    """Applies QK-norm and then RoPE along an axis, in float32 with one rounding at the end.

    Args:
      x: Projection, whose `axis` has size h.
      scale: QK-norm scale that broadcasts against `x`.
      position: Rotary table that broadcasts against `x`.
      axis: Axis of the head dimensions.
      store_norms: Selects the form for GPUs, along the last axis, with the least memory traffic: the norm
        of each vector is stored before it is applied. XLA would otherwise store normalized vectors,
        in float32.
    """
    y = x.astype(jnp.float32)
    inverse_norm = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis, keepdims=True) + QK_NORM_EPS)
    if store_norms:
        inverse_norm = jax.lax.optimization_barrier(inverse_norm)
        return apply_rope_by_reversal(y * inverse_norm * scale.astype(jnp.float32), position).astype(x.dtype)
    return apply_rope(y * inverse_norm * scale.astype(jnp.float32), position, axis, x.dtype)
