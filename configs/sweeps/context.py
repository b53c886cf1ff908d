"""Training on imperfect context: the model's own estimates of earlier blocks, noise on true blocks, or neither.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/context.py:cpu --workdir=runs/context_cpu

Variants: cpu, drawings, ffhq1024, imagenet256. A step with own context costs a forward pass more, so these models
train for fewer steps of equal FLOPs in total. Compare the seam score with that of real images: visible borders
between blocks raise it.
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.sweeps import budget
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, apply_overrides, config_beside

SEEDS = 5
BLOCKS = (4, 16)


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def _arms(c: ConfigDict, blocks: int) -> list[dict[str, Any]]:
    """Returns the overrides of the base, of noise on the context, and of own context at equal FLOPs."""
    base = {"model.blocks": blocks}
    own_context = base | {"train.own_context": 0.5}
    steps = budget.train_steps(
        apply_overrides(c, own_context), "flops", budget.training_flops(apply_overrides(c, base))
    )
    return [base, base | {"train.context_noise": 100}, own_context | {"train.steps": steps}]


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    arms = {blocks: _arms(c, blocks) for blocks in BLOCKS}
    names = ("noise up to timestep 100 on the context", "own context for half of the examples")
    return Sweep(
        question="Do models draw better blocks if they train on imperfect context?",
        runs=[{**arm, "seed": seed} for seed in range(SEEDS) for blocks in BLOCKS for arm in arms[blocks]],
        sample_budgets={"steps": (c.sample.steps,)},
        protocol=Protocol(
            primary="seam",
            secondary="KID",
            claims=[
                Claim(
                    f"With L = {blocks}, {name} makes borders less visible",
                    arm,
                    arms[blocks][0],
                    ("steps", c.sample.steps),
                )
                for blocks in BLOCKS
                for name, arm in zip(names, arms[blocks][1:])
            ],
            refuted_if="an interval lies on the other side of 0",
        ),
    )
