"""Policies of `config.model.remat`: values of a decoder layer that the backward pass does not recompute."""

import jax
from jax import Array
from jaxtyping import Float

from madformer_jax.ops.attention.base import CHECKPOINT_NAME, checkpoint_residual

_PROJECTION_NAME = "projections"
_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "projections": jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME, _PROJECTION_NAME),
    "attention": _SAVE_ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def _name(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return checkpoint_residual(x, _PROJECTION_NAME)


# `checkpoint_residual` names integers, which have no gradient.
_name.defvjp(lambda x: (_name(x), None), lambda _, gradient: (gradient,))


def name_projection(x: Float[Array, "*shape"], remat: str) -> Float[Array, "*shape"]:
    """Names a projection (queries, keys, values, gate or up) if the policy is `projections`, which stores it."""
    return _name(x) if remat == "projections" else x
