"""D against the width of the model, at equal training steps: does the best D move with size?

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/size.py:digits --workdir=runs/size_digits

Variants: digits, drawings, ffhq1024, imagenet256. The head size, the ratio of SwiGLU and the U-Net
do not change. Sampling budgets are full-model passes for each guidance branch. They count every
layer that runs (`flops.model_passes`).
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps.sweep_file import Sweep, config_beside


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def points(c: ConfigDict) -> list[dict[str, Any]]:
    """Returns 2/3, all and 5/3 of the heads, each with D = N / 4, N / 2 and N."""
    m = c.model
    return [
        {
            "model.width": m.width * heads // m.heads,
            "model.heads": heads,
            "model.mlp_width": m.mlp_width * heads // m.heads,
            "model.diffusion_depth": m.depth * k // 4,
        }
        for heads in (round(m.heads * 2 / 3), m.heads, round(m.heads * 5 / 3))
        for k in (1, 2, 4)
    ]


def sweep(variant: str = "digits") -> Sweep:
    c = get_config(variant)
    return Sweep(
        question="Does the best D depend on the size of the model?",
        runs=[{**point, "seed": seed} for seed in range(3) for point in points(c)],
        sample_budgets={"passes": [passes * flops.guidance_branches(c) for passes in (4, 16)]},
    )
