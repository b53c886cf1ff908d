"""Solver steps by block: fewer for later blocks, fewer for earlier blocks, or the same for all.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/steps_by_block.py:cpu --workdir=runs/steps_by_block_cpu

Variants: cpu, gpu, drawings, ffhq1024, imagenet256. All schedules have the same mean number of steps, so that an image
costs the same passes. DiSA (arXiv 2505.20297) claims that later blocks need fewer steps. The schedule
that gives them more is the control.
"""

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, apply_overrides, config_beside, grid

FALLING, RISING = "linear:1.5x:0.5x", "linear:0.5x:1.5x"


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    steps = (2, 4, 8) if variant in ("cpu", "gpu", "drawings") else (10, 50)
    # L = 16 costs most. The published protocol of `cpu` has the passes of L = 4, within which L = 16 takes fewer steps.
    costly = {} if variant == "cpu" else {"model.blocks": 16}
    passes = [flops.model_passes(apply_overrides(c, costly | {"sample.steps": n})) for n in steps]
    return Sweep(
        question="Do later blocks need fewer solver steps than earlier blocks?",
        runs=grid({"model.blocks": (4, 16)}, seeds=5),
        evaluations=[{"sample.steps_by_block": schedule} for schedule in ("constant", FALLING, RISING)],
        sample_budgets={"passes": passes},
        protocol=Protocol(
            primary="KID",
            secondary="seam",
            claims=[
                Claim(
                    f"With L = {blocks} and {n} steps on average, fewer steps for later blocks are better",
                    {"model.blocks": blocks, "sample.steps_by_block": FALLING},
                    {"model.blocks": blocks, "sample.steps_by_block": baseline},
                    ("passes", amount),
                )
                for blocks in (4, 16)
                for n, amount in zip(steps[:2], passes)
                for baseline in ("constant", RISING)
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
