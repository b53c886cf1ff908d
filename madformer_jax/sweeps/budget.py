"""Budgets of training and sampling, and the numbers of steps that use them up.

`sweep_file` derives `train.steps` of a run with `train_steps`. `modes.sweep` derives the solver steps
of an evaluation with `solver_steps`. To add a kind of budget, extend `TRAIN_BUDGET_KINDS` or
`SAMPLE_BUDGET_KINDS` and the cost that belongs to it (`train_steps`, `sampling_cost`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from madformer_jax.config import block_steps, validation
from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import stored_config

TRAIN_BUDGET_KINDS = ("steps", "images", "flops")
SAMPLE_BUDGET_KINDS = ("steps", "nfe", "passes", "flops", "seconds")
ROUNDING = 1e-9  # relative excess over a budget that is rounding
TOLERANCE = 0.5  # largest relative miss of a budget: steps are whole numbers


class Timing(NamedTuple):
    """Seconds that sampling an image takes, as a linear function of the solver steps."""

    fixed: float
    per_step: float

    def seconds(self, steps: int) -> float:
        return self.fixed + self.per_step * steps


def is_amount(value: object) -> bool:
    """Returns whether a value is a positive finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def training_flops(c: ConfigDict) -> float:
    """Returns the FLOPs of a whole training, without those of the codec, which no sweep changes."""
    return flops.training_step(c, encode=False).total * c.train.steps


def train_steps(c: ConfigDict, kind: str, amount: float) -> int:
    """Returns the training steps that use up a budget, at least one.

    Args:
      c: The config of the run; its own `train.steps` is ignored.
      kind: One of `TRAIN_BUDGET_KINDS`.
      amount: The budget in units of `kind`.

    Raises:
      ConfigError: The kind is unknown, or a single step costs far more than the budget.
    """
    step_cost = {"steps": 1.0, "images": c.train.batch, "flops": flops.training_step(c, encode=False).total}
    if kind not in TRAIN_BUDGET_KINDS:
        raise ConfigError(f"train_budget: {kind!r} is not a kind: use one of {', '.join(TRAIN_BUDGET_KINDS)}.")
    steps = max(1, round(amount / step_cost[kind]))
    return _check_tolerance("train_budget", kind, amount, steps, lambda n: n * step_cost[kind])


def solver_steps(c: ConfigDict, kind: str, amount: float, timing: Timing | None = None) -> int:
    """Returns the most solver steps whose cost of an image lies within a budget, at least 1.

    The report compares settings within a budget, so samples that cost more would not count.

    Args:
      c: The config of the evaluation; its own `sample.steps` is ignored.
      kind: One of `SAMPLE_BUDGET_KINDS`. "nfe" is the paper's count, "passes" counts every layer that
        runs (`flops.model_passes`). Both count each branch of a guided step.
      amount: The budget of one image in units of `kind`.
      timing: The measured seconds; needed if `kind` is "seconds".

    Raises:
      ConfigError: The kind is unknown, the cost misses the budget by more than `TOLERANCE`, or the steps do
        not vary.
    """
    if kind not in SAMPLE_BUDGET_KINDS:
        raise ConfigError(f"sample_budgets: {kind!r} is not a kind: use one of {', '.join(SAMPLE_BUDGET_KINDS)}.")
    check_steps_vary(c)

    @functools.cache
    def cost(steps: int) -> float:
        return sampling_cost(c, kind, steps, timing)

    affordable = amount * (1 + ROUNDING)
    low, high = 1, validation.max_solver_steps(c) + 1  # bisection: the result lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= affordable else (low, middle)
    return _check_tolerance("sample_budgets", kind, amount, low, cost)


def check_steps_vary(c: ConfigDict) -> None:
    """Checks that the steps of blocks follow from `sample.steps`, which a budget decides.

    Raises:
      ConfigError: `sample.steps_by_block` fixes them.
    """
    if not block_steps.depends_on_steps(c.sample.steps_by_block):
        raise ConfigError(
            f"sample_budgets: config.sample.steps_by_block={c.sample.steps_by_block!r} fixes the steps of all blocks: write "
            "multiples of config.sample.steps, as in 'linear:1.5x:0.5x'."
        )


def sampling_cost(c: ConfigDict, kind: str, steps: int, timing: Timing | None = None) -> float:
    """Returns the cost of sampling an image with `steps` solver steps, in units of `kind`."""
    if kind == "steps":
        return steps
    if kind == "seconds":
        assert timing is not None  # callers measure before they ask for seconds
        return timing.seconds(steps)
    c = c.copy_and_resolve_references()
    c.sample.steps = steps
    return flops.image_cost(c, stored_config.guide_config(c))[kind]


def _check_tolerance(name: str, kind: str, amount: float, steps: int, cost: Callable[[int], float]) -> int:
    if abs(cost(steps) - amount) > TOLERANCE * amount:
        raise ConfigError(
            f"{name}: {amount:g} {kind} are out of reach: the nearest is {cost(steps):.4g}, with {steps} steps. Choose another "
            "amount."
        )
    return steps
