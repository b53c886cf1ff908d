"""D, the layers of N that run at every solver step: Table 1 and Figure 4 of the paper, with intervals.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/depth.py:digits --workdir=runs/depth_digits

Variants: digits, drawings, ffhq1024, imagenet256. All runs train for the same number
of steps. A solver step is cheaper with a small D, so a small D takes more steps at equal NFE (the
cost by the formula of the paper). The sweep samples at equal steps and at equal NFE.
"""

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    c = get_config(variant)
    layers, branches = c.model.depth, flops.guidance_branches(c)
    paper = variant in ("ffhq1024", "imagenet256")
    return Sweep(
        question="Is a small D better under a small sampling budget, and a large D under a large one?",
        runs=grid({"model.diffusion_depth": [layers * k // 4 for k in (1, 2, 3, 4)]}, seeds=3),
        sample_budgets={
            "steps": (5, 10, 25, 50, 100, 250) if paper else (1, 2, 4, 8, 16, 32),
            "nfe": (5, 10, 25, 50, 100) if paper else [nfe * branches for nfe in (2, 4, 8, 16)],
        },
    )
