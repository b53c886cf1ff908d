"""Stacks of the streams' queries, keys and values, which one call of cuDNN serves (section 3.2).

`attention.cudnn` attends with these stacks. Their blocks are in descending order, see
`attention.cudnn_tiles`. Queries and keys arrive as projections. QK-norm and RoPE write the stack, by
a kernel of `attention.qk_kernels` where sizes allow, else by XLA.

Shapes use the letters of `attention.base`; n streams.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from madformer_jax.ops.attention import qk_kernels
from madformer_jax.ops.attention.qk_norm_rope import Projectable, apply_to_tree, is_projected


def stack_streams(arrays: Sequence[Float[Array, "B _ s *rest"]]) -> Float[Array, "B L n s *rest"]:
    """Stacks the arrays of the streams. Shorter ones are padded with zeros.

    With the barrier, the tiles are slices of the stack. Without it, XLA would compute QK-norm and RoPE again
    for every tile.
    """
    blocks = max(x.shape[1] for x in arrays)
    return jax.lax.optimization_barrier(jnp.stack([pad_blocks(x, blocks)[:, ::-1] for x in arrays], axis=2))


def pad_blocks(x: Float[Array, "B _ s *rest"], blocks: int) -> Float[Array, "B {blocks} s *rest"]:
    """Appends blocks of zeros."""
    return jnp.pad(x, [(0, 0), (0, blocks - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def unstack(x: Float[Array, "B L n s *rest"], stream: int, blocks: int) -> Float[Array, "B {blocks} s *rest"]:
    """Inverts `stack_streams` for one stream."""
    return x[:, ::-1][:, :blocks, stream]


def stack_projections(projections: Sequence[Projectable]) -> Float[Array, "B L n s H h"]:
    """Stacks the queries or keys of the streams, each an array or a `ProjectedQK`."""
    if all(map(qk_kernels.supports, projections)):
        return qk_kernels.stack(projections)
    return stack_streams(apply_to_tree(list(projections), store_norms=True))


def projection_gradient(
    projection: Projectable, stack: Float[Array, "B L n s H h"], stream: int, terms: Sequence[Float[Array, "B _ s H h"]]
) -> Projectable:
    """Returns the gradient of one argument of `stack_projections`.

    Args:
      projection: The argument.
      stack: Gradient of the stack.
      stream: Its index in the stack.
      terms: Further gradients of its queries or keys, to be added.
    """
    is_kernel = qk_kernels.supports(projection)
    if is_kernel and not terms:
        return qk_kernels.gradient(stack, projection, stream)
    x = projection.x if is_projected(projection) else projection
    total = sum_in_float32([unstack(stack, stream, x.shape[1]), *terms])
    if is_kernel:
        return qk_kernels.gradient(total[:, :, None], projection, None)
    return jax.vjp(lambda y: apply_to_tree(y, store_norms=True), projection)[1](total)[0]


def sum_in_float32(arrays: Sequence[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """Returns the sum, rounded once."""
    return sum((x.astype(jnp.float32) for x in arrays[1:]), arrays[0].astype(jnp.float32)).astype(arrays[0].dtype)
