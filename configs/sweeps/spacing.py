"""Timesteps of the solver at few steps: leading (the release's for DDIM) against trailing (ours), for each D.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/spacing.py:digits --workdir=runs/spacing_digits

Variants: digits, drawings, ffhq1024, imagenet256. The trainings are those of depth.py: a copy of its folders `runs` and
`judges` in the workdir is taken up, and only sampled from.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    layers = get_config(variant).model.depth
    return Sweep(
        question="Is the advantage of a small D at few steps one of the timesteps' spacing?",
        runs=grid({"model.diffusion_depth": [layers * k // 4 for k in (1, 2, 3, 4)]}, seeds=3),
        evaluations=[{"sample.solver": "ddim", "sample.spacing": spacing} for spacing in ("leading", "trailing")],
        sample_budgets={"steps": (2, 4, 8, 16)},
    )
