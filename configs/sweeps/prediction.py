"""Prediction type: the noise, v or the clean latent, with its own error or with the error of v.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/prediction.py:digits --workdir=runs/prediction_digits

Variants: digits, drawings, ffhq1024, imagenet256.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    points = [("eps", "output"), ("eps", "v"), ("v", "v"), ("x0", "output"), ("x0", "v")]
    return Sweep(
        question="Which output is easiest to learn: the noise, v or the clean latent?",
        runs=[
            {"model.prediction_type": prediction_type, "loss.weighting": weighting, "seed": seed}
            for seed in range(3)
            for prediction_type, weighting in points
        ],
        sample_budgets={"steps": (4, get_config(variant).sample.steps)},
    )
