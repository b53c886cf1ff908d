"""Separate or shared parameters of the clean and the noisy stream: Table 4 of the paper.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/towers.py:digits --workdir=runs/towers_digits

Variants: digits, drawings, ffhq1024, imagenet256.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    return Sweep(
        question="Do the two streams need parameters of their own?",
        runs=grid({"model.param_sets": ("separate", "shared")}, seeds=3),
        sample_budgets={"steps": (4, get_config(variant).sample.steps)},
    )
