"""The prediction type: noise, v or clean latent on the ddpm path, and the velocity on the flow path.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/prediction.py:cpu_tuning --workdir=runs/prediction_tuning
    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/prediction.py:cpu --workdir=runs/prediction_cpu

Variants: cpu_tuning (three learning rates each, on a seed that `cpu` does not use), cpu, ffhq1024,
imagenet256. The base of `cpu` has a patch of 2 and a U-Net with more channels than a position has values,
so that it does not decide for the clean latent beforehand. Enter the best rates in `LEARNING_RATES`.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside

TUNING_SEED = 100
FACTORS = (0.5, 1.0, 2.0)  # of the base's learning rate
ARMS = (
    ("eps", "output", "ddpm"), ("v", "v", "ddpm"), ("x0", "output", "ddpm"), ("x0", "v", "ddpm"), ("v", "output", "flow"),
)  # fmt: skip
FIELDS = ("model.prediction_type", "loss.weighting", "diffusion.path")  # of an arm
LEARNING_RATES: dict[tuple[str, ...], float] = {}  # arm -> factor that tuning found best; 1 where it is absent


def get_config(variant: str = "cpu") -> ConfigDict:
    c = config_beside(__file__, "bases.py", variant.removesuffix("_tuning"))
    if variant.startswith("cpu"):
        c.codec.patch, c.model.unet_channels = 2, (32, 64)
        c.model.unet_attention = (False, False)
    return c


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    tuning = variant == "cpu_tuning"
    eps, v, x0, _, flow = (dict(zip(FIELDS, arm)) for arm in ARMS)
    steps = (4, 16) if variant.startswith("cpu") else (4, c.sample.steps)
    return Sweep(
        question="Which target is best: the noise, v, the clean latent, or the velocity of rectified flow?",
        runs=[
            {**dict(zip(FIELDS, arm)), "optimizer.learning_rate": factor * c.optimizer.learning_rate, "seed": seed}
            for seed in ((TUNING_SEED,) if tuning else range(3))
            for arm in ARMS
            for factor in (FACTORS if tuning else (LEARNING_RATES.get(arm, 1.0),))
        ],
        sample_budgets={"steps": steps},
        protocol=None
        if tuning
        else Protocol(
            primary="KID",
            secondary="FD",
            claims=[
                Claim("The clean latent is better than the noise", x0, eps, ("steps", steps[-1])),
                Claim("The clean latent is better than v", x0, v, ("steps", steps[-1])),
                Claim("Rectified flow is better than the clean latent", flow, x0, ("steps", steps[-1])),
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
