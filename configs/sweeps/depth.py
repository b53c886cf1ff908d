"""D, the diffusion layers: those of the N layers that run at every solver step.

This is the paper's Table 1 and Figure 4, with intervals.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/depth.py:cpu --workdir=runs/depth_cpu

Variants: cpu; gpu; cpu_eps (the model predicts the noise); digits and drawings (three seeds);
ffhq1024 and imagenet256. All runs train for the same number of steps. A solver step is cheaper with a
small D, so that the same NFE (the paper's count, without the clean tower) allows more steps. The comparison lets
each D stop at its best step count within the budget.
"""

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps.protocol import AFTER, BEFORE, Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid

EARLIER = ("digits", "drawings")  # their claims were written after first results, which are withdrawn


def get_config(variant: str = "cpu") -> ConfigDict:
    c = config_beside(__file__, "bases.py", variant.removesuffix("_eps"))
    if variant == "cpu_eps":  # noise needs a U-Net with more channels than a position has values (docs/training.md)
        c.model.prediction_type = "eps"
        c.codec.patch, c.model.unet_channels = 2, (32, 64)
        c.model.unet_attention = (False, False)
    return c


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    layers, branches = c.model.depth, flops.guidance_branches(c)
    budgets = {
        "cpu": {"steps": (1, 2, 3, 4, 6, 8, 12, 16), "nfe": (1, 2, 4, 8, 16)},
        "cpu_eps": {"steps": (1, 2, 4, 8, 16, 32, 64), "nfe": (2, 4, 8, 16, 32)},
        "digits": {"steps": (1, 2, 4, 8, 16, 32), "nfe": [nfe * branches for nfe in (2, 4, 8, 16)]},
        "drawings": {"steps": (1, 2, 4, 8, 16, 32), "nfe": [nfe * branches for nfe in (2, 4, 8, 16)]},
    }.get("cpu" if variant == "gpu" else variant, {"steps": (5, 10, 25, 50, 100, 250), "nfe": (5, 10, 25, 50, 100)})
    small, large = {"model.diffusion_depth": layers // 4}, {"model.diffusion_depth": layers}
    few = budgets["nfe"][1 if variant in ("cpu", "gpu") else 0]
    return Sweep(
        question="Is a small D better under a small sampling budget, and a large D under a large one?",
        runs=grid(
            {"model.diffusion_depth": [layers * k // 4 for k in (1, 2, 3, 4)]}, seeds=3 if variant in EARLIER else 5
        ),
        sample_budgets=budgets,
        protocol=Protocol(
            primary="KID",
            secondary="FD",
            claims=[
                Claim("At the small budget D = N / 4 is better than D = N", small, large, ("nfe", few)),
                Claim("At the large budget D = N is better than D = N / 4", large, small, ("nfe", budgets["nfe"][-1])),
            ],
            refuted_if="an interval lies on the other side of 0",
            written=AFTER if variant in EARLIER else BEFORE,
        ),
    )
