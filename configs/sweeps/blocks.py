"""L, the blocks of an image, at several resolutions (the paper's Table 2).

The paper finds that blocks help as the resolution grows.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/blocks.py:drawings --workdir=runs/blocks_drawings

Variants: drawings (the same images at 32, 64 and 128 px), and digits, ffhq1024 and imagenet256 at
their own resolution.
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import fields
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid

STEPS = {32: 600, 64: 600, 128: 300}  # image size -> training steps; a step at 128 px costs four times as much


def get_config(variant: str = "drawings") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "drawings") -> Sweep:
    c = get_config(variant)
    sides: list[dict[str, Any]] = [{}]
    if variant == "drawings":  # the patch and the U-Net's stages change with the resolution
        others = [fields.flat(config_beside(__file__, "../drawings.py", f"side={side}")) for side in STEPS]
        swept = sorted({name for other in others for name in other if other[name] != others[0][name]})
        sides = [
            {name: other[name] for name in swept}
            | {"model.unet_channels": c.model.unet_channels * len(other["model.unet_channels"]), "train.steps": steps}
            for other, steps in zip(others, STEPS.values())
        ]
    points = grid({"model.blocks": (1, 4, 16)}, seeds=3)
    return Sweep(
        question="Do more blocks help, and do they help more at higher resolutions?",
        runs=[{**side, **point} for point in points for side in sides],
        sample_budgets={"steps": (c.sample.steps,)},
    )
