"""What a sweep varied: the axes of its results."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.config import aliases, fields

SEED_FIELD, STEPS_FIELD = (
    "seed",
    "sample.steps",
)  # what varies without being an axis: the repetition, and what the budget decides
# the paper's
_SYMBOLS = {"diffusion_depth": "D", "blocks": "L", "depth": "N", "ar_condition": "AR condition", "hidden": "λ hidden"}


class Axis(NamedTuple):
    """A field that a sweep varies."""

    field: str
    values: tuple[Any, ...]  # in order
    follows: tuple[str, ...] = ()  # fields that change with it: "train.steps"

    @property
    def label(self) -> str:
        name = self.field.rpartition(".")[2]
        return _SYMBOLS.get(name, name.replace("_", " "))


def value_of(run: Mapping[str, Any], evaluation: Mapping[str, Any], field: str) -> Any:
    """Of a field in one evaluation of a run, {} for the training alone; None where the config has no such field."""
    for given in (evaluation.get("overrides", {}), run["overrides"]):
        if field in given:
            return given[field]
    return run["config"].get(field)


def training_axes(runs: Sequence[Mapping[str, Any]], planned: Iterable[Mapping[str, Any]]) -> list[Axis]:
    """Of the runs that are there and those still to come."""
    plan = (aliases.current_names(fields.flat(run["overrides"]), "sweep.json") for run in planned)
    overrides = [*plan, *(run["overrides"] for run in runs)]
    names = list(dict.fromkeys(name for given in overrides for name in given if name != SEED_FIELD))
    default = {name: run["config"].get(name) for name in names for run in runs if name not in run["overrides"]}
    return _varying_axes([{name: given.get(name, default.get(name)) for name in names} for given in overrides])


def sampling_axes(runs: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """Of the settings at which each trained model is judged."""
    pairs = [(run, evaluation) for run in runs for evaluation in run["evaluations"]]
    names = dict.fromkeys(name for _, evaluation in pairs for name in evaluation["overrides"] if name != STEPS_FIELD)
    return _varying_axes([{name: value_of(run, evaluation, name) for name in names} for run, evaluation in pairs])


def _varying_axes(rows: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """The fields that differ between rows; one that others decide follows them."""
    axes: list[Axis] = []
    for name in rows[0] if rows else ():
        values = tuple(sorted({row[name] for row in rows}, key=sort_key))
        if len(values) == 1:
            continue
        i = next((i for i in range(len(axes)) if _determines(rows, axes[i : i + 1], name)), None)
        if i is None and _determines(rows, axes, name):
            i = len(axes) - 1
        if i is None:
            axes.append(Axis(name, values))
        else:
            axes[i] = axes[i]._replace(follows=(*axes[i].follows, name))
    return axes


def _determines(rows: Sequence[Mapping[str, Any]], axes: Sequence[Axis], name: str) -> bool:
    keys = [tuple(row[axis.field] for axis in axes) for row in rows]
    return bool(axes) and len({(*key, row[name]) for key, row in zip(keys, rows)}) == len(set(keys))


def sort_key(value: Any) -> tuple[bool, float, str]:
    """A key that sorts numbers by value, and then all else by name."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)
