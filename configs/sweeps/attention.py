"""Attention of the diffusion layers over the whole sequence or within a block: Table 5 of the paper.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/attention.py:digits --workdir=runs/attention_digits

Variants: digits, drawings, ffhq1024, imagenet256.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    return Sweep(
        question="Must the diffusion layers see the blocks before?",
        runs=grid({"model.diffusion_attention": ("sequence", "block")}, seeds=3),
        sample_budgets={"steps": (4, get_config(variant).sample.steps)},
    )
