"""The prediction type: noise, v or clean latent on the ddpm path, and the velocity on the flow path.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/prediction.py:cpu_tuning --workdir=runs/prediction_tuning
    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/prediction.py:cpu --workdir=runs/prediction_cpu

Variants: cpu_tuning, cpu, ffhq1024, imagenet256. `cpu_tuning` trains each arm with three learning rates
and a seed that `cpu` does not use. The rate with the fewest bits per dimension goes into `TUNED`. The
base of `cpu` has a patch of 2 and a U-Net with more channels than a latent position has values. With
fewer channels the clean latent would have an advantage from the start.
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside

TUNING_SEED = 100
FACTORS = (1.0, 2.0, 4.0)  # of the base's learning rate
ARMS = (
    ("eps", "output", "ddpm"), ("v", "v", "ddpm"), ("x0", "output", "ddpm"), ("x0", "v", "ddpm"), ("v", "output", "flow"),
)  # fmt: skip
FIELDS = ("model.prediction_type", "loss.weighting", "diffusion.path")  # of an arm
TUNED = dict(zip(ARMS, (4.0, 4.0, 2.0, 2.0, 2.0)))  # the best factor of each arm by `cpu_tuning`, for `cpu`


def get_config(variant: str = "cpu") -> ConfigDict:
    c = config_beside(__file__, "bases.py", variant.removesuffix("_tuning"))
    c.evaluate.held_out_n = 1000
    if variant.startswith("cpu"):
        c.codec.patch, c.model.unet_channels = 2, (32, 64)
        c.model.unet_attention = (False, False)
    if variant == "cpu_tuning":
        c.evaluate.n = 100  # the bits decide; a sweep also needs samples
    return c


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    rate = c.optimizer.learning_rate

    def overrides(arm: tuple[str, ...], factor: float) -> dict[str, Any]:
        # Sorted, so that a report names the path, the first axis, and the base, which is the clean latent.
        return dict(sorted(zip(FIELDS, arm))) | {"optimizer.learning_rate": factor * rate}

    if variant == "cpu_tuning":
        return Sweep(
            question="Which learning rate is best for each target?",
            runs=[overrides(arm, factor) | {"seed": TUNING_SEED} for arm in ARMS for factor in FACTORS],
            sample_budgets={"steps": (4,)},
        )
    arms = [overrides(arm, TUNED[arm] if variant == "cpu" else 1.0) for arm in ARMS]
    eps, v, x0, _, flow = arms
    return Sweep(
        question="Which target is best: the noise, v, the clean latent, or the velocity of rectified flow?",
        runs=[arm | {"seed": seed} for seed in range(5) for arm in arms],
        sample_budgets={"steps": (4, 16) if variant == "cpu" else (4, c.sample.steps)},
        protocol=Protocol(
            primary="bits_per_dimension",
            secondary="KID",
            claims=[
                Claim("The clean latent is better than the noise", x0, eps),
                Claim("The clean latent is better than v", x0, v),
                Claim("Rectified flow is better than the clean latent", flow, x0),
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
