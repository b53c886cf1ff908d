"""Conditioning of the diffusion layers on earlier blocks (the paper's Table 3).

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/conditioning.py:digits --workdir=runs/conditioning_digits

Variants: digits (published), drawings, ffhq1024, imagenet256. `ablations.py` has the same switches with
five seeds, held-out losses and an arm of equal FLOPs. Turning off a stream or the AR condition also
turns off its loss term, as in the authors' release.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import AFTER, Claim, Protocol
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
    both, no_ar_condition, no_clean_stream = points
    return Sweep(
        question="Do the clean stream and the AR condition improve the samples?",
        runs=[{**point, "seed": seed} for seed in range(3) for point in points],
        sample_budgets={"steps": (4, c.sample.steps)},
        protocol=Protocol(
            primary="loss_image",
            secondary="KID",
            claims=[
                Claim("The AR condition lowers the training loss of the image", both, no_ar_condition),
                Claim("The clean stream lowers the training loss of the image", both, no_clean_stream),
            ],
            refuted_if="an interval lies below an improvement of 2 %",
            margin=0.02,
            written=AFTER,
        ),
    )
