"""Base configs of the sweeps in this folder. This file is not a sweep.

cpu                     digits for a few minutes a run on two CPU cores: without guidance, 2,000 scored images, and
                        the loss of 1,000 held-out images at the end
gpu                     drawings of 64 px with 256 tokens, four times the steps and images a step; made for sweeps of
                        about 25 minutes on one H200 (estimated, never run there)
digits, drawings        fewer steps and images than configs/NAME.py; blocks.py and structure.py start from drawings
ffhq1024, imagenet256   have the steps and images of configs/NAME.py, as in the paper (docs/testbed.md)
"""

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.sweeps.sweep_file import config_beside

_STEPS = {"cpu": 640, "gpu": 2500, "digits": 800, "drawings": 600}


def get_config(variant: str) -> ConfigDict:
    if variant not in ("cpu", "gpu", "digits", "drawings", "ffhq1024", "imagenet256"):
        raise ConfigError(
            f"--config: variant {variant!r} is unknown: cpu, gpu, digits, drawings, ffhq1024 or imagenet256."
        )
    file = {"cpu": "digits", "gpu": "drawings"}.get(variant, variant)
    c = config_beside(__file__, f"../{file}.py", "side=64" if file == "drawings" else None)
    c.train.judge = False  # the sweep evaluates its runs itself
    if variant in _STEPS:
        c.train.steps = _STEPS[variant]
        c.train.log_every, c.train.checkpoint_every, c.train.sample_every = 50, 200, 0
        c.sample.batch = 100
        c.evaluate.n = 500
    if variant == "gpu":
        c.codec.patch = 4
        c.train.batch, c.train.scan, c.train.lanes = 64, 50, 0
        c.sample.batch = 500
        c.evaluate.network = "attributes"
    if variant in ("cpu", "gpu"):
        c.sample.guidance = 1.0  # guidance doubles the cost of an image, and raises the FD of digits
        c.evaluate.n = 2000
        c.train.validate_every, c.train.validate_n = c.train.steps, 1000
    if variant == "drawings":  # as small as digits, and without guidance, which doubles the cost of an image
        c.model.width, c.model.heads, c.model.mlp_width = 96, 3, 256
        c.model.unet_channels = (64,)
        c.model.unet_context = False  # the paper's U-Net
        c.sample.n = c.sample.grid = 50
        c.sample.steps = 20
        c.sample.guidance = 1.0
        c.evaluate.network = "attributes"  # distances of the classifier hardly differ between runs
    return c
