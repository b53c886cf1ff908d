"""Each part of the model removed or changed by itself (the paper's Tables 3 to 6).

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/ablations.py:cpu --workdir=runs/ablations_cpu

Variants: cpu, gpu, ffhq1024, imagenet256. As in the authors' release, a model without the AR condition trains
without the hidden loss. Its training step costs a third less, so a second arm trains it for equal FLOPs.
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.sweeps import budget
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, apply_overrides, config_beside

SEEDS = 5
NO_AR_CONDITION = {"model.ar_condition": False, "loss.hidden": 0.0}


def get_config(variant: str = "cpu") -> ConfigDict:
    c = config_beside(__file__, "bases.py", variant)
    c.train.validate_every, c.train.validate_n = c.train.steps, 1000  # the primary endpoint
    return c


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    equal_steps = budget.train_steps(apply_overrides(c, NO_AR_CONDITION), "flops", budget.training_flops(c))
    without: list[tuple[str, dict[str, Any]]] = [  # the claim that the base is better, and the other arm
        ("The AR condition lowers the loss", NO_AR_CONDITION),
        ("The AR condition lowers the loss at equal training FLOPs", NO_AR_CONDITION | {"train.steps": equal_steps}),
        ("The clean stream lowers the loss", {"model.clean_stream": False, "loss.clean": 0.0}),
        ("Separate parameters of the two streams lower the loss", {"model.param_sets": "shared"}),
        ("Attention to earlier blocks in the diffusion layers lowers the loss", {"model.diffusion_attention": "block"}),
        ("A hidden loss of weight 0.1 lowers the loss against none", {"loss.hidden": 0.0}),
        ("A hidden loss of weight 0.1 lowers the loss against 0.01", {"loss.hidden": 0.01}),
    ]
    base_clean = {"loss.clean": c.loss.clean}
    other_clean = {"loss.clean": 0.0 if c.loss.clean else 0.1}
    with_clean, no_clean = (base_clean, other_clean) if c.loss.clean else (other_clean, base_clean)
    arms: list[dict[str, Any]] = [{}, *(overrides for _, overrides in without), other_clean]
    return Sweep(
        question="Which parts of the model lower the loss of held-out images?",
        runs=[{**arm, "seed": seed} for seed in range(SEEDS) for arm in arms],
        sample_budgets={"steps": (8,)} if variant in ("cpu", "gpu") else {"steps": (c.sample.steps,)},
        protocol=Protocol(
            primary="held_out_loss_image",
            secondary="KID",
            claims=[
                *(Claim(text, {}, overrides) for text, overrides in without),
                Claim("A clean loss of weight 0.1 lowers the loss", with_clean, no_clean),
            ],
            refuted_if="the simultaneous interval of a claim lies below an improvement of 2 %",
            margin=0.02,
        ),
    )
