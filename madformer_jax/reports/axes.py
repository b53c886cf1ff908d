"""The axes of a sweep: the fields that vary between its runs and between its evaluations.

`results.load_results` finds the axes of a sweep with `training_axes` and `sampling_axes`. To give a
field the paper's symbol in tables and figures, add it to `_SYMBOLS`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.config import aliases, fields

_SYMBOLS = {
    "diffusion_depth": "D",
    "blocks": "L",
    "depth": "N",
    "ar_condition": "AR condition",
    "hidden": "λ hidden",
    "clean": "λ clean",
}


class Axis(NamedTuple):
    """A field that a sweep varies."""

    field: str  # name in the config
    values: tuple[Any, ...]  # sorted
    dependent_fields: tuple[str, ...] = ()  # fields that follow from `field`, or from all axes up to it

    @property
    def label(self) -> str:
        name = self.field.rpartition(".")[2]
        return _SYMBOLS.get(name, name.replace("_", " "))


def value_of(run: Mapping[str, Any], evaluation: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a field in an evaluation of a run, or None if the config lacks the field.

    Args:
      run: The content of a result.json.
      evaluation: One of the run's evaluations, or {} for the training.
    """
    for overrides in (evaluation.get("overrides", {}), run["overrides"]):
        if field in overrides:
            return overrides[field]
    return run["config"].get(field)


def training_axes(runs: Sequence[Mapping[str, Any]], planned: Iterable[Mapping[str, Any]]) -> list[Axis]:
    """Returns the axes of the trainings, both the finished and the planned ones."""
    plan = (aliases.current_names(fields.flat(run["overrides"]), "sweep.json") for run in planned)
    overrides = [*plan, *(run["overrides"] for run in runs)]
    names = list(dict.fromkeys(name for run in overrides for name in run if name != "seed"))  # it repeats a run
    default = {name: run["config"].get(name) for name in names for run in runs if name not in run["overrides"]}
    return _varying_axes([{name: run.get(name, default.get(name)) for name in names} for run in overrides])


def sampling_axes(runs: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """Returns the axes of the evaluations of each trained model."""
    pairs = [(run, evaluation) for run in runs for evaluation in run["evaluations"]]
    overridden = (name for _, evaluation in pairs for name in evaluation["overrides"])
    names = dict.fromkeys(name for name in overridden if name != "sample.steps")  # the budget decides it
    return _varying_axes([{name: value_of(run, evaluation, name) for name in names} for run, evaluation in pairs])


def _varying_axes(rows: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """Returns the fields that differ between rows.

    A field whose value follows from that of an axis, or from those of all axes so far, is not an axis
    of its own: it becomes a dependent field.
    """
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
            axes[i] = axes[i]._replace(dependent_fields=(*axes[i].dependent_fields, name))
    return axes


def _determines(rows: Sequence[Mapping[str, Any]], axes: Sequence[Axis], name: str) -> bool:
    """Returns whether the values of the axes determine the value of a field in all rows."""
    keys = [tuple(row[axis.field] for axis in axes) for row in rows]
    return bool(axes) and len({(*key, row[name]) for key, row in zip(keys, rows)}) == len(set(keys))


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Returns a key that sorts numbers by value, followed by everything else by name."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)
