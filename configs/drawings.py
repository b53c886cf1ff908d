"""Color drawings in pixel space, conditional on a style or a caption; trains on a CPU in minutes.

    python -m madformer_jax.main --config=configs/drawings.py --workdir=runs/drawings

The PyPI package dicebear-core draws the pictures once, into the user's cache. Nothing else is
downloaded. Without a variant a small model draws 32 x 32 pixels: the README's first command.
Variants, after a colon:

side=32, 64, 128 or 256   the same pictures at another size, with the same number of tokens a block
text                      a model of 64 x 64 pixels that reads captions (docs/text.md)
"""

from ml_collections import ConfigDict

from madformer_jax import config
from madformer_jax.errors import ConfigError

# Image side -> patch side, number of U-Net stages. Each stage after the first halves the side of a
# block, so that every variant has 4 x 4 tokens a block.
_SIDES = {32: (4, 1), 64: (8, 1), 128: (8, 2), 256: (16, 2)}
SHORT_STEPS = 1200  # of the run without a variant: 3 minutes on two CPU cores of 0.2 TFLOP/s


def get_config(variant: str = "") -> ConfigDict:
    chosen = config.variant(variant, {"side": 0}, ("text",))
    side = chosen["side"] or (64 if chosen["text"] else 32)
    if side not in _SIDES:
        raise ConfigError(f"--config: variant side={side} is unknown: one of {', '.join(map(str, _SIDES))}.")
    patch, stages = _SIDES[side]

    c = config.base()
    c.data.source = "drawings"
    c.data.image_size = side
    c.data.test_share = 0.1
    c.codec.name = "pixel"
    c.codec.patch = patch

    c.model.prediction_type = "x0"  # a latent position has more values than the U-Net has channels (docs/training.md)
    c.model.unet_context = True  # halves the visible borders between blocks (docs/training.md)
    c.model.width = 192
    c.model.heads = 6
    c.model.depth = 4  # N
    c.model.diffusion_depth = 2  # D
    c.model.mlp_width = 512
    c.model.blocks = 4  # L: 16 tokens a block
    c.model.unet_channels = (96,) * stages
    c.model.unet_attention = (False,) * stages
    c.model.unet_layers = 1
    c.model.unet_heads = 4
    c.model.unet_time_width = 64
    c.model.classes = 5

    c.train.batch = 16
    c.train.steps = 3300
    c.train.ema_decay = 0.999
    c.train.sample_every = c.train.checkpoint_every = 1000
    c.optimizer.learning_rate = 1e-3
    c.optimizer.decay = 0.4

    c.sample.n = c.sample.batch = c.sample.grid = 100
    c.sample.steps = 40  # with 20 steps the borders between blocks show a little more
    c.sample.guidance = 1.5
    c.sample.clip_x0 = 1.0
    if not variant:  # a step costs half as much, and the loss after as many steps is the same
        c.model.width, c.model.heads, c.model.mlp_width = 128, 4, 384
        c.model.unet_channels = (64,)
        c.data.drawings = 14_000
        c.train.steps = SHORT_STEPS
        c.train.judge = True
        c.optimizer.learning_rate, c.optimizer.decay = 1.5e-3, 0.5
        c.sample.steps = 20
        c.evaluate.n = 500
    if chosen["text"]:
        c.model.classes = 0
        c.text.tokenizer, c.text.vocabulary = "drawings", 835
        c.text.length = 40  # the longest caption has 38 tokens
        c.loss.text = 0.002  # a larger weight spends the text tower on predicting words (docs/text.md)
        c.sample.prompts = "data:test"
        c.model.unet_kernel = 1  # allows a third more steps in the same time (docs/text.md)
        c.train.steps = 5000
    return c
