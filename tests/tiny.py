"""The smallest class-conditional model on the embedded digits in which things can go wrong.

With the variant `plain` a single layer on a single block, which compiles in a few seconds: for what is not about the model.
"""

from ml_collections import ConfigDict

from madformer_jax.config import schema


def get_config(variant: str = "") -> ConfigDict:
    c = schema.base()
    c.data.image_size, c.data.channels = 32, 1
    c.codec.name, c.codec.patch = "pixel", 4
    c.model.width, c.model.heads, c.model.mlp_width = 16, 2, 24
    c.model.depth, c.model.diffusion_depth = 3, 1
    c.model.blocks = 4
    c.model.unet_channels, c.model.unet_attention = (8,), (True,)
    c.model.unet_layers, c.model.unet_time_width = 1, 8
    c.model.unet_groups = c.model.unet_heads = 4
    c.model.classes = 10
    c.train.batch, c.train.steps = 8, 6
    c.train.log_to = ""  # only the tests of trackers read them
    c.train.log_every, c.train.checkpoint_every, c.train.keep = 2, 2, 5
    c.optimizer.learning_rate = 1e-3
    c.mesh.data = 1
    c.sample.n, c.sample.batch, c.sample.steps, c.sample.guidance = 5, 4, 2, 1.5
    if variant == "plain":
        c.model.depth = c.model.diffusion_depth = c.model.blocks = 1
        c.model.unet_attention = (False,)
        c.model.classes, c.sample.guidance = 0, 1.0
    return c
