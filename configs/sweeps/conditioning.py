"""Diffusion layers with and without the clean stream and the AR condition: Table 3 of the paper.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/conditioning.py:digits --workdir=runs/conditioning_digits

Variants: digits, drawings, ffhq1024, imagenet256. A run without a stream or condition also trains
without its loss term, as in the release.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.sweep_file import Sweep, config_beside


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    c = get_config(variant)
    points = [
        {
            "model.ar_condition": True,
            "model.clean_stream": True,
            "loss.hidden": c.loss.hidden,
            "loss.clean": c.loss.clean,
        },
        {"model.ar_condition": False, "model.clean_stream": True, "loss.hidden": 0.0, "loss.clean": c.loss.clean},
        {"model.ar_condition": True, "model.clean_stream": False, "loss.hidden": c.loss.hidden, "loss.clean": 0.0},
    ]
    return Sweep(
        question="What do the clean blocks and the AR condition bring?",
        runs=[{**point, "seed": seed} for seed in range(3) for point in points],
        sample_budgets={"steps": (4, c.sample.steps)},
    )
