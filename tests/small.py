"""The model of most tests: the smallest in which things can go wrong, with parameters whose every path matters."""

import functools
import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from madformer_jax.config import schema
from madformer_jax.models import madformer
from madformer_jax.models.madformer import MADFormer


def small(**changes: Any) -> tuple[MADFormer, Any]:
    """A model in which no two sizes are equal, with `changes` to config.model, and its parameters."""
    model = madformer.build(small_config(**changes))
    return model, random_params(model)


def small_config(**changes: Any) -> ConfigDict:
    """The config of `small`."""
    c = schema.base()
    c.codec.name, c.codec.patch = "pixel", 1
    c.data.image_size, c.data.channels = 8, 3
    c.model.width, c.model.heads, c.model.mlp_width = 16, 2, 20
    c.model.depth, c.model.diffusion_depth, c.model.blocks = 4, 2, 4
    c.model.unet_channels, c.model.unet_layers, c.model.unet_time_width = (4, 8), 1, 6
    c.model.unet_groups = c.model.unet_heads = 2
    length = changes.pop("text_length", 1)
    c.model.update(changes)
    schema.validate(c)
    c.text.length = length  # a model may read several classes, no command line says so
    return c


def random_params(model: MADFormer) -> Any:
    """Parameters of a trained look: nothing is zero or one. Drawn by numpy: compiling `init` takes longer than most tests."""
    abstract = nn.meta.unbox(jax.eval_shape(functools.partial(madformer.init, model), jax.random.key(0)))
    rng = np.random.default_rng(1)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(x.shape, np.float32)
        name = path[-1].key
        if name in ("kernel", "embedding", "boi"):
            stacked = "body" in [part.key for part in path]  # over layers
            fan_in = math.prod(x.shape[stacked:-1]) if name == "kernel" else 1
            return noise * np.float32(fan_in**-0.5)
        return np.float32(0.1) * noise + np.float32(name == "scale")

    return jax.tree_util.tree_map_with_path(draw, abstract)
