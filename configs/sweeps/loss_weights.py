"""Weight of the hidden loss term, lambda_hidden: Table 6 of the paper and one larger value.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/loss_weights.py:digits --workdir=runs/loss_weights_digits

Variants: digits, drawings, ffhq1024, imagenet256.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    return Sweep(
        question="Does the loss on the AR condition help, and how much of it?",
        runs=grid({"loss.hidden": (0.0, 0.1, 1.0)}, seeds=3),
        sample_budgets={"steps": (4, get_config(variant).sample.steps)},
    )
