"""Noise on the clean blocks in training: do errors add up over blocks, do borders show, and does noise help?

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/context_noise.py:digits --workdir=runs/context_noise_digits

Variants: digits, drawings, ffhq1024, imagenet256. Read the seam score beside the distances and
compare it with that of real images.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    return Sweep(
        question="Do errors add up over the blocks, and does noise on the context help?",
        runs=grid({"model.blocks": (4, 16), "train.context_noise": (0, 100, 300)}, seeds=3),
        sample_budgets={"steps": (get_config(variant).sample.steps,)},
    )
