"""Rectified flow against the DDPM path, with equal models and training.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/noise_path.py:cpu --workdir=runs/noise_path_cpu

Variants: cpu, gpu. The trainings of `ddpm` in `cpu` are those of the base of ablations.py:cpu. To skip
them, copy the folders `runs` and `judges` of its workdir into the workdir of this sweep. The answer
decides `diffusion.path` of configs/digits.py and drawings.py.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid

FEW, MANY = 8, 20


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "cpu") -> Sweep:
    return Sweep(
        question="Is rectified flow better than the DDPM path?",
        runs=grid({"diffusion.path": ("ddpm", "flow")}, seeds=5),
        sample_budgets={"steps": (FEW, MANY)},
        protocol=Protocol(
            primary="KID",
            secondary="FD",
            claims=[
                Claim(
                    f"Flow is better than ddpm within {steps} solver steps",
                    {"diffusion.path": "flow"},
                    {"diffusion.path": "ddpm"},
                    ("steps", steps),
                )
                for steps in (FEW, MANY)
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
