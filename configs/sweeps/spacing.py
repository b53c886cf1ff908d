"""Timestep spacing at few solver steps, for each D: leading (DDIM of the authors' release) or trailing.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/spacing.py:cpu --workdir=runs/spacing_cpu

Variants: cpu, digits, drawings, ffhq1024, imagenet256. The trainings are those of depth.py. To skip them,
copy the folders `runs` and `judges` of its workdir into the workdir of this sweep.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "cpu") -> Sweep:
    layers = get_config(variant).model.depth
    return Sweep(
        question="Does the advantage of a small D at few steps depend on the timestep spacing?",
        runs=grid({"model.diffusion_depth": [layers * k // 4 for k in (1, 2, 3, 4)]}, seeds=5),
        evaluations=[{"sample.solver": "ddim", "sample.spacing": spacing} for spacing in ("leading", "trailing")],
        sample_budgets={"steps": (2, 4, 8, 16)},
        protocol=Protocol(
            primary="KID",
            secondary="FD",
            claims=[
                Claim(
                    f"With {spacing} timesteps D = N / 4 is better than D = N at 2 steps",
                    {"model.diffusion_depth": layers // 4, "sample.spacing": spacing},
                    {"model.diffusion_depth": layers, "sample.spacing": spacing},
                    ("steps", 2),
                )
                for spacing in ("leading", "trailing")
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
