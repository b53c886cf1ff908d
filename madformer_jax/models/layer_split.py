"""Moving the border between AR layers and diffusion layers within the same parameters.

All decoder layers have equal parameter trees, so a model with another D reads the same N layers in two
other stacks. `training.train_step` and `inference_params` call `fit` inside their programs. Parameters
stay stored with the split of `model.diffusion_depth`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from madformer_jax.models.layers import Params
from madformer_jax.models.madformer import MADFormer

STAGES = ("ar_layers", "diffusion_layers")


def with_depth(model: MADFormer, diffusion_depth: int) -> MADFormer:
    """Returns the model with another number of diffusion layers D; the same model if D does not differ."""
    if diffusion_depth == model.config.diffusion_depth:
        return model
    return MADFormer(dataclasses.replace(model.config, diffusion_depth=diffusion_depth))


def fit(model: MADFormer, params: Params) -> Params:
    """Returns the parameters with the split of the model.

    Args:
      model: A model.
      params: Parameters of a model that differs at most in D. Layers are stacked, as in training.

    Returns:
      The same tree if its split is that of the model. Otherwise a tree with restacked layers.
    """
    ar_depth = model.config.depth - model.config.diffusion_depth
    stages = [params.get(name, {}) for name in STAGES]
    if _layer_count(stages[0]) == ar_depth:
        return params
    pieces = [piece for stage in stages for piece in _pieces(stage)]
    layers = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
    others = {name: x for name, x in params.items() if name not in STAGES}
    bounds = zip(STAGES, ((0, ar_depth), (ar_depth, model.config.depth)), strict=True)
    return others | {name: _stage(layers, *bound) for name, bound in bounds if bound[0] < bound[1]}


def _layer_count(stage: Params) -> int:
    return sum(jax.tree.leaves(piece)[0].shape[0] for piece in _pieces(stage))


def _pieces(stage: Params) -> list[Any]:
    """Returns the layers of a stage, stacked along the first axis, in one or two pieces."""
    pieces = [stage["body"]] if "body" in stage else []
    return pieces + ([jax.tree.map(lambda x: x[None], stage["last"])] if "last" in stage else [])


def _stage(layers: Any, first: int, end: int) -> Params:
    """Returns a stage of the layers from `first` to `end`, in the form of `transformer.LayerStack`."""
    body = {"body": jax.tree.map(lambda x: x[first : end - 1], layers)} if end - first > 1 else {}
    return body | {"last": jax.tree.map(lambda x: x[end - 1], layers)}
