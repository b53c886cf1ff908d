"""Noise on the clean blocks during training, as a remedy for errors that accumulate over blocks.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/context_noise.py:cpu --workdir=runs/context_noise_cpu

Variants: cpu, digits, drawings, ffhq1024, imagenet256. Compare the seam score with that of real images:
visible borders between blocks raise it.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "cpu") -> Sweep:
    return Sweep(
        question="Do errors accumulate over the blocks, and does noise on the context help?",
        runs=grid({"model.blocks": (4, 16), "train.context_noise": (0, 100, 300)}, seeds=5),
        sample_budgets={"steps": (get_config(variant).sample.steps,)},
        protocol=Protocol(
            primary="seam",
            secondary="KID",
            claims=[
                Claim(
                    f"With L = {blocks} noise up to timestep {noise} makes borders less visible",
                    {"model.blocks": blocks, "train.context_noise": noise},
                    {"model.blocks": blocks, "train.context_noise": 0},
                    ("steps", get_config(variant).sample.steps),
                )
                for blocks in (4, 16)
                for noise in (100, 300)
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
