"""Parameters as sampling reads them, thousands of times: in the type of the computation, and whole on each device where they fit."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from madformer_jax.models import madformer
from madformer_jax.models.layers import all_gather_kernel
from madformer_jax.models.madformer import MADFormer
from madformer_jax.models.transformer import unstack_layers

MAX_MEMORY_FRACTION = (
    0.3  # of a device's memory that whole parameters may take: activations and the VAE take up to as much again
)

_STAGES = ("ar_layers", "diffusion_layers")
_FLOAT32_NAMES = (
    "linear_1",
    "linear_2",
    "text_head",
)  # in float32 whatever the model's type: `unet.TimeEmbedding`, the logits


def inference_params(model: MADFormer, params: Any, memory: int) -> Any:
    """The parameters with every kernel cast once, not at each use, which changes no bit of what is drawn; layers stand apart where
    no loop goes over them.

    Args:
      params: float32, traced or not, under a mesh split as `partitioning.RULES` says.
      memory: bytes of a device. Where the parameters take less than SHARE of it, each device gets all but what is split over
        "tensor", so that nothing is gathered inside the loops over layers, steps and blocks; 0: they stay split.
    """
    cast = jax.tree_util.tree_map_with_path(functools.partial(_cast_param, model.dtype), params)
    if sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cast)) < MAX_MEMORY_FRACTION * memory:
        # a second of a start on a CPU
        boxed = jax.eval_shape(functools.partial(madformer.init, model), jax.random.key(0))
        cast = jax.tree.map(all_gather_kernel, cast, nn.get_partition_spec(boxed))
    return {name: unstack_layers(x, model.unroll) if name in _STAGES else x for name, x in cast.items()}


def _cast_param(dtype: Any, path: tuple[Any, ...], x: Any) -> Any:
    names = [part.key for part in path]
    exact = any(name in _FLOAT32_NAMES or "norm" in name for name in names) or names[:2] == ["upsampler", "conv_out"]
    return x if exact else jnp.asarray(x, dtype)
