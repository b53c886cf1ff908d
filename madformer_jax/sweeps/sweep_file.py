"""What a sweep is: the trainings and the evaluations that a file of configs/sweeps asks for.

Such a file has two functions. `get_config(variant)` returns the base; `sweep(variant)` returns a `Sweep`.
"""

import hashlib
import itertools
import json
import os
import runpy
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from madformer_jax.config import aliases, fields, identity
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.sweeps import budget

Overrides = Mapping[str, Any]  # field -> value, as in {"model.diffusion_depth": 2}

# The budget gives the steps, and evaluate.n the number of images.
_SWEEP_FIELDS = ("sample.n", "sample.steps", "evaluate.grid")
# They decide which steps evaluate.checkpoints="last:5" names.
_CHECKPOINT_FIELDS = ("train.checkpoint_every", "train.keep", "train.keep_every")


class Sweep(NamedTuple):
    """Trainings, and how each trained model is judged."""

    question: str  # that it answers, in one sentence
    runs: Sequence[Overrides]  # of the base, one training each; `grid` makes them
    sample_budgets: Mapping[
        str, Sequence[float]
    ]  # kind (`budget.SAMPLE_BUDGET_KINDS`) -> amounts, at each of which images are judged
    evaluations: Sequence[Overrides] = ({},)  # of `sample`, each judged at every budget
    train_budget: tuple[str, float] | None = (
        None  # kind (`budget.TRAIN_BUDGET_KINDS`) and amount, equal for all; None: `train.steps`
    )


class Evaluation(NamedTuple):
    """One judgement of a trained model."""

    overrides: Overrides
    kind: str
    asked: float

    def describe(self) -> dict[str, Any]:
        return {"overrides": dict(self.overrides), "budget": {"kind": self.kind, "asked": self.asked}}


class Run(NamedTuple):
    """One training."""

    name: str  # of its folder: a hash of its settings, or the name that an earlier version gave to the same settings
    overrides: dict[str, Any]
    config: ConfigDict

    @property
    def point(self) -> dict[str, Any]:
        """The overrides without the seed, which repeats a point."""
        return {field: value for field, value in self.overrides.items() if field != "seed"}


def grid(axes: Mapping[str, Sequence[Any]], seeds: int = 1) -> list[dict[str, Any]]:
    """Every combination of the values of fields, for each of the first `seeds` seeds; all points of a seed come together."""
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [{**point, "seed": seed} for seed in range(seeds) for point in points]


def config_beside(file: str, name: str, variant: str | None = None) -> ConfigDict:
    """What get_config of another config file returns, whose name is relative to that of `file`."""
    get_config = runpy.run_path(os.path.join(os.path.dirname(file), name))["get_config"]
    return get_config() if variant is None else get_config(variant)


class ConfigFile(Protocol):
    """A config file that has been run."""

    @property
    def module(self) -> types.ModuleType: ...

    @property
    def args(self) -> tuple[str, ...]:
        """Of its functions: the variant, if one was given."""


def load_sweep(file: ConfigFile) -> Sweep:
    """The sweep of a config file.

    Raises:
      ConfigError: it has none, or one that is wrong.
    """
    function = getattr(file.module, "sweep", None)
    if not callable(function):
        raise ConfigError(
            f"{file.module.__file__} has no function sweep(): --mode=sweep needs a file as in configs/sweeps."
        )
    try:
        found = function(*file.args)
    except ConfigError:
        raise
    except Exception as error:  # it is code, which may raise anything
        raise ConfigError(f"{file.module.__file__}: sweep(): {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, Sweep):
        raise ConfigError(f"{file.module.__file__}: sweep() returned a {type(found).__name__}, not a Sweep.")
    source = f"{file.module.__file__}: sweep()"
    runs, evaluations = (
        [aliases.current_names(overrides, source) for overrides in several]
        for several in (found.runs, found.evaluations)
    )
    return found._replace(runs=runs, evaluations=evaluations)


def expand_runs(sweep: Sweep, base: ConfigDict) -> list[Run]:
    """Its runs, in order.

    Raises:
      ConfigError: there are none, two are the same, or one's settings or budget are wrong.
    """
    if not sweep.runs:
        raise ConfigError("the sweep has no runs.")
    runs: dict[str, Run] = {}
    for overrides in sweep.runs:
        c = apply_overrides(base, overrides)
        if sweep.train_budget is not None:
            c.train.steps = budget.train_steps(c, *sweep.train_budget)
        config_lib.validate(c)
        name = settings_hash(c)
        if name in runs:
            raise ConfigError(
                f"the sweep has the same run twice: {runs[name].overrides} and {dict(overrides)} differ in nothing that decides "
                "a result. Remove one of them."
            )
        runs[name] = Run(name, dict(overrides), c)
    return list(runs.values())


def expand_evaluations(sweep: Sweep) -> list[Evaluation]:
    """The same for every run, in order.

    Raises:
      ConfigError: there are none, or one sets what is not of `sample`.
    """
    found = [
        Evaluation(overrides, kind, amount)
        for overrides in sweep.evaluations
        for kind, amounts in sweep.sample_budgets.items()
        for amount in amounts
    ]
    if not found:
        raise ConfigError("the sweep has no evaluations: give it sample_budgets.")
    for field in itertools.chain(*sweep.evaluations):
        if not field.startswith("sample.") or field in ("sample.steps", "sample.n"):
            raise ConfigError(
                f"evaluations: {field} is none of a sampling's settings: give those of `sample` but for steps, which "
                "follow from the budget, and n, which is evaluate.n."
            )
    return found


def apply_overrides(base: ConfigDict, overrides: Overrides) -> ConfigDict:
    """A copy of a config with other values.

    Raises:
      ConfigError: there is no such field, or a value is of another type.
    """
    c = base.copy_and_resolve_references()
    values, changes = fields.flat(base), aliases.current_names(overrides, "the sweep's overrides")
    try:
        fields.check(values | changes, values)
    except ConfigError as error:
        raise ConfigError(f"the sweep's overrides {dict(overrides)}: {error}") from None
    c.update_from_flattened_dict(changes)
    return c


def changed_settings(values: fields.Section) -> dict[str, Any]:
    """Returns the fields that decide the results of a run, where they differ from the defaults.

    Args:
      values: A config, or what a workdir or a result has stored of one.
    """
    defaults = fields.flat(config_lib.base())
    stored = aliases.current_names(fields.flat(values), "a stored config")
    found = identity.identifying_fields(stored, defaults)
    if found["evaluate.checkpoints"].startswith("last:"):
        found |= {name: stored.get(name, defaults[name]) for name in _CHECKPOINT_FIELDS}
    return {name: value for name, value in found.items() if value != defaults[name] and name not in _SWEEP_FIELDS}


def settings_hash(values: fields.Section) -> str:
    """Returns a hash of `changed_settings`, under the names that the fields had first."""
    named = aliases.first_names(changed_settings(values))
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]


def judge_hash(c: ConfigDict) -> str:
    """Returns a hash of what decides classifier and reference."""
    values, defaults = fields.flat(c.data), config_lib.base().data
    found = {
        name: x
        for name, x in values.items()
        if identity.affects_results(f"data.{name}") and name not in ("split", "flip")
    }
    # These decide nothing. Their defaults were in the hash before, so that judges keep their names.
    found |= {name: defaults[name] for name in ("threads", "batches_ahead", "max_corrupt")}
    found |= {"network": c.evaluate.network, "evaluated": c.evaluate.split}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
