"""Budgets: what is held equal where runs are compared, and the steps that follow from it."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError

TRAIN_BUDGET_KINDS = ("steps", "images", "flops")
SAMPLE_BUDGET_KINDS = ("steps", "nfe", "passes", "flops", "seconds")
MAX_SOLVER_STEPS = 999  # solver steps: limits.py
TOLERANCE = 0.5  # share by which an achieved budget may miss the one that was asked for: steps are whole numbers


class Timing(NamedTuple):
    """Seconds of drawing an image: `fixed` and `per_step` of the solver."""

    fixed: float
    per_step: float

    def seconds(self, steps: int) -> float:
        return self.fixed + self.per_step * steps


def training_flops(c: ConfigDict) -> float:
    """Of a whole training, without the codec, which no choice of a sweep changes."""
    return flops.training_step(c, encode=False).total * c.train.steps


def train_steps(c: ConfigDict, kind: str, amount: float) -> int:
    """Training steps of this config that use up a budget, at least one.

    Raises:
      ConfigError: there is no such kind, or not even one step fits.
    """
    step = {"steps": 1.0, "images": c.train.batch, "flops": flops.training_step(c, encode=False).total}
    if kind not in TRAIN_BUDGET_KINDS:
        raise ConfigError(f"train_budget: {kind!r} is no kind: one of {', '.join(TRAIN_BUDGET_KINDS)}.")
    return _check_tolerance("train_budget", kind, amount, max(1, round(amount / step[kind])), lambda n: n * step[kind])


def solver_steps(c: ConfigDict, kind: str, amount: float, timing: Timing | None = None) -> int:
    """Solver steps with which drawing an image by this config comes nearest to a budget.

    Args:
      c: the config; its own `sample.steps` does not count.
      kind: of `SAMPLING`, of one image: "nfe" is the paper's count, "passes" counts every layer that runs (`flops`); both
        count each branch of a guided step.
      amount: how much of it.
      timing: measured, for seconds.

    Raises:
      ConfigError: there is no such kind, or no number of steps comes near.
    """
    if kind not in SAMPLE_BUDGET_KINDS:
        raise ConfigError(f"sample_budgets: {kind!r} is no kind: one of {', '.join(SAMPLE_BUDGET_KINDS)}.")

    def cost(steps: int) -> float:
        return sampling_cost(c, kind, steps, timing)

    low, high = 1, MAX_SOLVER_STEPS  # the last that costs no more lies in [low, high), if there is one
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= amount else (low, middle)
    nearest = min((low, high), key=lambda steps: abs(cost(steps) - amount))
    return _check_tolerance("sample_budgets", kind, amount, nearest, cost)


def sampling_cost(c: ConfigDict, kind: str, steps: int, timing: Timing | None = None) -> float:
    """What drawing an image by `steps` solver steps costs."""
    if kind == "steps":
        return steps
    if kind == "seconds":
        assert timing is not None  # nobody asks before it is measured
        return timing.seconds(steps)
    c = c.copy_and_resolve_references()
    c.sample.steps = steps
    return flops.image_cost(c)[kind]


def _check_tolerance(what: str, kind: str, amount: float, steps: int, cost: Callable[[int], float]) -> int:
    if abs(cost(steps) - amount) > TOLERANCE * amount:
        raise ConfigError(
            f"{what}: {amount:g} {kind} are out of reach: the nearest is {cost(steps):.4g}, with {steps} steps."
        )
    return steps
