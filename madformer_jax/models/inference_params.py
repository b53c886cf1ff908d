"""Conversion of training parameters to the form that sampling reads thousands of times.

Kernels are cast once to the type of the computation. If they fit, every device holds them whole
(except for the split over "tensor"), so that no loop gathers them. `sampling.generation` calls
`inference_params` inside its programs. A layer that computes in float32 in every model must be in
`_FLOAT32_NAMES`.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from madformer_jax.models import layer_split, madformer
from madformer_jax.models.layers import Params, all_gather_kernel, unstack_layers
from madformer_jax.models.madformer import MADFormer

# Fraction of a device's memory that gathered parameters may take. Activations and the VAE take up
# to as much again.
MAX_MEMORY_FRACTION = 0.3

_FLOAT32_NAMES = ("linear_1", "linear_2", "text_head")  # `unet.TimeEmbedding` and the head of the text logits


def inference_params(model: MADFormer, params: Params, memory: int) -> Params:
    """Casts, gathers and unstacks parameters for sampling.

    Every kernel is cast once and not at each use, which changes no bit of the samples. Layers are
    unstacked if no loop runs over them (`layers.unstack_layers`).

    Args:
      model: The model.
      params: Its parameters in float32, traced or not, with the split of any D. Under a mesh they are split by
        `partitioning.RULES`.
      memory: Memory of a device in bytes. If the parameters take less than `MAX_MEMORY_FRACTION` of
        it, each device gets all of them except for the split over "tensor". 0 keeps them split.

    Returns:
      The parameters.
    """
    params = layer_split.fit(model, params)
    cast = jax.tree_util.tree_map_with_path(functools.partial(_cast_param, model.config.dtype), params)
    if sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cast)) < MAX_MEMORY_FRACTION * memory:
        # `eval_shape` takes a second on a CPU, so it runs only if needed.
        boxed = jax.eval_shape(functools.partial(madformer.init, model), jax.random.key(0))
        cast = jax.tree.map(all_gather_kernel, cast, nn.get_partition_spec(boxed))
    unroll = model.config.depth if model.config.attention.unrolls_layers else model.config.scan_unroll
    return {name: unstack_layers(x, unroll) if name in layer_split.STAGES else x for name, x in cast.items()}


def _cast_param(dtype: DTypeLike, path: tuple[Any, ...], x: ArrayLike) -> ArrayLike:
    """Casts a parameter to `dtype`, unless its layer computes in float32."""
    names = [key.key for key in path]
    is_float32 = any(name in _FLOAT32_NAMES or "norm" in name for name in names)
    return x if is_float32 or names[:2] == ["upsampler", "conv_out"] else jnp.asarray(x, dtype)
