"""Checks that the results in a sweep's folder belong together. `results.load_results` calls them."""

from collections.abc import Mapping, Sequence
from typing import Any

from madformer_jax.config import aliases, fields, identity
from madformer_jax.errors import ConfigError
from madformer_jax.reports.axes import Axis, value_of

# Sections of fields that are the same in all runs, unless the sweep varies them.
_SECTIONS = ("model.", "text.", "loss.", "diffusion.", "codec.", "data.", "optimizer.", "evaluate.", "seeds.")


def belongs_to_plan(run: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """Returns whether a result is one of the sweep of a plan, the content of sweep.json.

    Runs of another sweep, copied for their trainings, belong to it as soon as they have the plan's evaluations.
    """
    if "sweep" not in plan or (run["sweep"], run["variant"]) == (plan["sweep"], plan["variant"]):
        return True

    def described(evaluations: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [(aliases.current_names(fields.flat(x["overrides"]), "sweep.json"), x["budget"]) for x in evaluations]

    planned = any(run["name"] == other["name"] for other in plan["runs"])
    return planned and described(run["evaluations"]) == described(plan["evaluations"])


def check_same_settings(runs: Sequence[Mapping[str, Any]], axes: Sequence[Axis]) -> None:
    """Checks that the runs differ only in fields that the sweep varies.

    Fields of `train` may differ between settings, since a budget decides them, but not within one.

    Raises:
      ConfigError: Two runs differ in another field that decides results.
    """
    swept = {name for run in runs for name in run["overrides"]}
    first: dict[Any, Mapping[str, Any]] = {}
    for run in runs:
        setting = tuple(value_of(run, {}, axis.field) for axis in axes)
        for other, sections in (
            (runs[0], _SECTIONS),
            (first.setdefault(setting, run), ("train.",)),
        ):
            for name, value in run["config"].items():
                counts = name.startswith(sections) and identity.affects_results(name) and name not in swept
                if counts and value != other["config"].get(name):
                    raise ConfigError(
                        f"runs {other['name']} and {run['name']} differ in {name}: {other['config'].get(name)!r} against "
                        f"{value!r}, which the sweep does not vary. Report them from separate folders."
                    )
    _check_same_held_out_images(runs)


def _check_same_held_out_images(runs: Sequence[Mapping[str, Any]]) -> None:
    """Checks `train.validate_n`. A run keeps its name if it changes, and results of earlier versions do not hold it."""
    names = {run["training"].get("held_out_images"): run["name"] for run in reversed(runs)}
    names.pop(None, None)
    if len(names) > 1:
        (n, name), (other_n, other_name), *_ = sorted(names.items())
        raise ConfigError(
            f"the held-out losses of runs {name} and {other_name} are of {n} and of {other_n} images (train.validate_n). "
            "Report them from separate folders."
        )


def check_same_protocol(expected: Mapping[str, Any], protocol: Mapping[str, Any], run: str) -> None:
    a, b = fields.flat(expected), fields.flat(protocol)
    for name in a | b:
        if a.get(name) != b.get(name):
            raise ConfigError(
                f"scores of different protocols do not share a column: {name} {a.get(name)!r} against {b.get(name)!r} of run "
                f"{run}. Evaluate all runs alike, or report them from separate folders."
            )
