"""Solver timesteps at few steps, for each D: leading (the release with DDIM) or trailing (our default).

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/spacing.py:digits --workdir=runs/spacing_digits

Variants: digits, drawings, ffhq1024, imagenet256. The trainings are those of depth.py. Copy its
folders `runs` and `judges` into the workdir to sample from them without training again.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    layers = get_config(variant).model.depth
    return Sweep(
        question="Is the advantage of a small D at few steps due to the spacing of the timesteps?",
        runs=grid({"model.diffusion_depth": [layers * k // 4 for k in (1, 2, 3, 4)]}, seeds=3),
        evaluations=[{"sample.solver": "ddim", "sample.spacing": spacing} for spacing in ("leading", "trailing")],
        sample_budgets={"steps": (2, 4, 8, 16)},
    )
