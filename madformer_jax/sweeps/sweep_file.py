"""The definition of a sweep, and the runs and evaluations that follow from it.

A sweep file (configs/sweeps/*.py) has two functions: `get_config(variant)` returns the base config and
`sweep(variant)` returns a `Sweep`. The file imports `Sweep`, `grid` and `config_beside` from here, and
`Protocol` and `Claim` from `sweeps.protocol`.
`modes.sweep` calls `load_sweep`, `expand_runs` and `expand_evaluations`. `claim_check` checks the protocol.
"""

import hashlib
import itertools
import json
import os
import runpy
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from typing import Protocol as Interface

from ml_collections import ConfigDict

from madformer_jax.config import aliases, fields, identity
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.sweeps import budget
from madformer_jax.sweeps.protocol import Protocol

Overrides = Mapping[str, Any]  # field -> value, as in {"model.diffusion_depth": 2}

# Fields of `data` that the names of the published judges contain, even at their defaults.
_JUDGE_FIELDS = ("background", "channels", "crop", "drawings", "image_size", "source", "test_share")
# Fields that other fields decide: steps follow from the budget, the number of images from evaluate.n, the scale of latents
# from the VAE.
_DERIVED_FIELDS = ("sample.n", "sample.steps", "evaluate.grid", "codec.scaling_factor", "codec.shift_factor")
# Fields that decide which steps evaluate.checkpoints="last:5" selects.
_CHECKPOINT_FIELDS = ("train.checkpoint_every", "train.keep", "train.keep_every")


class Sweep(NamedTuple):
    """The trainings of a sweep and the evaluations of each trained model.

    Attributes:
      question: The question that the sweep answers, in one sentence.
      runs: Overrides of the base config, one training each. `grid` builds them.
      sample_budgets: Amounts for each kind of budget (`budget.SAMPLE_BUDGET_KINDS`). Every model is
        evaluated at each of them.
      evaluations: Overrides of `sample.*`. Each is evaluated at every sampling budget.
      train_budget: Kind (`budget.TRAIN_BUDGET_KINDS`) and amount that all trainings use up. If None,
        each run trains for `train.steps`.
      protocol: What the sweep decides, stated before it runs.
    """

    question: str
    runs: Sequence[Overrides]
    sample_budgets: Mapping[str, Sequence[float]]
    evaluations: Sequence[Overrides] = ({},)
    train_budget: tuple[str, float] | None = None
    protocol: Protocol | None = None


class Evaluation(NamedTuple):
    """One evaluation of a trained model: overrides of `sample.*` at an amount of a kind of budget."""

    overrides: Overrides
    kind: str
    amount: float

    def describe(self) -> dict[str, Any]:
        return {"overrides": dict(self.overrides), "budget": {"kind": self.kind, "asked": self.amount}}


class Run(NamedTuple):
    """One training."""

    name: str  # of its folder: `settings_hash`, or the name that an earlier version gave to the same settings
    overrides: dict[str, Any]  # of the base config
    config: ConfigDict

    @property
    def overrides_without_seed(self) -> dict[str, Any]:
        """The overrides that the repetitions with other seeds share."""
        return {field: value for field, value in self.overrides.items() if field != "seed"}


def grid(axes: Mapping[str, Sequence[Any]], seeds: int = 1) -> list[dict[str, Any]]:
    """Returns overrides for every combination of values and every seed.

    Args:
      axes: The values of each field, as in `{"model.blocks": (1, 4)}`.
      seeds: The number of seeds. All combinations with seed 0 come first.
    """
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [{**point, "seed": seed} for seed in range(seeds) for point in points]


def config_beside(file: str, name: str, variant: str | None = None) -> ConfigDict:
    """Returns the config of another config file.

    Args:
      file: Path of the calling file, `__file__`.
      name: Path of the other file, relative to the folder of `file`.
      variant: The argument of its get_config, if any.
    """
    get_config = runpy.run_path(os.path.join(os.path.dirname(file), name))["get_config"]
    return get_config() if variant is None else get_config(variant)


class ConfigFile(Interface):
    """An executed config file."""

    @property
    def module(self) -> types.ModuleType: ...

    @property
    def args(self) -> tuple[str, ...]:
        """The arguments of its functions: the variant, if the command line names one."""


def load_sweep(file: ConfigFile) -> Sweep:
    """Returns the sweep that a config file defines.

    Raises:
      ConfigError: The file has no function `sweep`, or the function fails or returns no Sweep.
    """
    function = getattr(file.module, "sweep", None)
    if not callable(function):
        raise ConfigError(
            f"{file.module.__file__} has no function sweep(): --mode=sweep needs a file as in configs/sweeps."
        )
    try:
        sweep = function(*file.args)
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{file.module.__file__}: sweep(): {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"{file.module.__file__}: sweep() returned a {type(sweep).__name__}, not a Sweep.")
    source = f"{file.module.__file__}: sweep()"
    runs, evaluations = (
        [aliases.current_names(overrides, source) for overrides in several]
        for several in (sweep.runs, sweep.evaluations)
    )
    return sweep._replace(runs=runs, evaluations=evaluations)


def expand_runs(sweep: Sweep, base: ConfigDict) -> list[Run]:
    """Returns the runs of a sweep, in order.

    Raises:
      ConfigError: The sweep has no runs, two runs are equal, or a setting or a budget is wrong.
    """
    if not sweep.runs:
        raise ConfigError("the sweep has no runs: give `Sweep.runs` at least one override, {} for the base.")
    if sweep.train_budget is not None and (len(sweep.train_budget) != 2 or not budget.is_amount(sweep.train_budget[1])):
        raise ConfigError(
            f"train_budget={sweep.train_budget!r} must be a kind and a number above 0, as in ('steps', 600)."
        )
    runs: dict[str, Run] = {}
    for overrides in sweep.runs:
        c = apply_overrides(base, overrides)
        if sweep.train_budget is not None:
            config_lib.validate(c)  # before its cost is computed
            c.train.steps = budget.train_steps(c, *sweep.train_budget)
        config_lib.validate(c)
        name = settings_hash(c)
        if name in runs:
            raise ConfigError(
                f"the sweep has the same run twice: {runs[name].overrides} and {dict(overrides)} give equal results. "
                "Remove one of them."
            )
        runs[name] = Run(name, dict(overrides), c)
    return list(runs.values())


def expand_evaluations(sweep: Sweep) -> list[Evaluation]:
    """Returns the evaluations of every run, in order.

    Raises:
      ConfigError: The sweep has no evaluations, the amounts of a budget are one number, or an evaluation sets
        a field outside of `sample`, or `sample.steps` or `sample.n`.
    """
    for kind, amounts in sweep.sample_budgets.items():
        if isinstance(amounts, str) or not isinstance(amounts, Sequence) or not all(map(budget.is_amount, amounts)):
            raise ConfigError(
                f"sample_budgets: {kind!r} has {amounts!r}: give a sequence of numbers above 0, as in (4, 16)."
            )
    evaluations = [
        Evaluation(overrides, kind, amount)
        for overrides in sweep.evaluations
        for kind, amounts in sweep.sample_budgets.items()
        for amount in amounts
    ]
    if not evaluations:
        raise ConfigError("the sweep has no evaluations: give it sample_budgets.")
    for field in itertools.chain(*sweep.evaluations):
        if not field.startswith("sample.") or field in ("sample.steps", "sample.n"):
            raise ConfigError(
                f"evaluations: {field} is not a setting of sampling: use fields of `sample`, except sample.steps "
                "(it follows from the budget) and sample.n (it is evaluate.n)."
            )
    return evaluations


def apply_overrides(base: ConfigDict, overrides: Overrides) -> ConfigDict:
    """Returns a copy of a config with other values.

    Raises:
      ConfigError: A field does not exist, or a value has another type.
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
    """Returns the fields that decide the results of a run and differ from the defaults.

    Args:
      values: A config, or its stored form in a workdir or a result.
    """
    defaults = fields.flat(config_lib.base())
    stored = aliases.current_names(fields.flat(values), "a stored config")
    settings = identity.identifying_fields(stored, defaults)
    if settings["evaluate.checkpoints"].startswith("last:"):
        settings |= {name: stored.get(name, defaults[name]) for name in _CHECKPOINT_FIELDS}
    return {name: value for name, value in settings.items() if value != defaults[name] and name not in _DERIVED_FIELDS}


def settings_hash(values: fields.Section) -> str:
    """Returns a hash of `changed_settings`, under the first names of the fields.

    It names the folder of a run.
    """
    named = aliases.first_names(changed_settings(values))
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]


def judge_hash(c: ConfigDict) -> str:
    """Returns a hash of the settings that decide a judge: its classifier and its reference.

    A field that was added after `_JUDGE_FIELDS` counts unless it has its default, so that judges keep
    their names.
    """
    values, defaults = fields.flat(c.data), config_lib.base().data
    settings = {
        name: x
        for name, x in values.items()
        if identity.affects_results(f"data.{name}") and name not in ("split", "flip")
        if x != defaults[name] or name in _JUDGE_FIELDS
    }
    # These do not matter. Earlier versions hashed their defaults.
    settings |= {name: defaults[name] for name in ("threads", "batches_ahead", "max_corrupt")}
    settings |= {"network": c.evaluate.network, "evaluated": c.evaluate.split}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
