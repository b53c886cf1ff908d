"""The results of a sweep, read back: what it varied, its points, and means over training seeds with their intervals.

A folder of a sweep holds runs/<hash>/result.json, one for each training, with timing.json beside it where its seconds were
measured, and sweep.json, the plan, which tells what is missing.
"""

import functools
import hashlib
import json
import math
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from madformer_jax.config import aliases, fields, identity
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError
from madformer_jax.reports import axes as axes_lib
from madformer_jax.reports.axes import Axis, sort_key, value_of
from madformer_jax.runtime import storage
from madformer_jax.sweeps import sweep_folder
from madformer_jax.sweeps.budget import SAMPLE_BUDGET_KINDS

COSTS = {
    "solver_steps": "solver steps",
    "nfe": "NFE",
    "passes": "full-model passes",
    "flops": "FLOPs",
    "seconds": "seconds",
}  # an image
HIGHER_IS_BETTER = ("IS", "precision", "recall", "recognised", "memorisation", "attributes")
_SHARED_PROTOCOL_KEYS = ("n", "reference", "network", "image", "scores")  # of a protocol
_PER_RUN_KEYS = ("step", "fingerprint", "seed", "steps")  # of a protocol's images: what is another one in every run
_PROMPT_KEYS = ("asked", "tokens")  # of a protocol's images: what follows from its "prompts"
_UNITS = {  # of budgets: one and many
    "steps": ("step", "steps"),
    "nfe": ("NFE", "NFE"),
    "passes": ("pass", "passes"),
    "flops": ("FLOPs", "FLOPs"),
    "seconds": ("second", "seconds"),
}
_SEPARATED_SECTIONS = (
    "data.",
    "codec.",
    "evaluate.",
)  # sections whose fields change what is compared: never in one table


class Budget(NamedTuple):
    """What the sampling of an image was given."""

    kind: str  # of `budget.SAMPLE_BUDGET_KINDS`
    asked: float

    @property
    def unit(self) -> str:
        return _UNITS[self.kind][1]

    def __str__(self) -> str:
        if self.kind == "flops":
            return f"{self.asked / 1e9:.4g} GFLOPs"
        one, many = _UNITS[self.kind]
        return f"{self.asked:.4g} {one if self.asked == 1 else many}"


class Score(NamedTuple):
    """A score of one set of images, and its bootstrap interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Point(NamedTuple):
    """One trained model, sampled at one budget."""

    setting: tuple[Any, ...]  # the value of each axis
    seed: int  # of the training
    budget: Budget
    run: str
    place: int  # among the run's evaluations
    cost: Mapping[str, float]  # of an image, in COSTS
    scores: Mapping[str, Score]


class ProtocolGroup(NamedTuple):
    """The points of one protocol: what may stand in one table."""

    name: str  # of what sets it apart: "image size = 32"; "" where the whole sweep is one
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]  # by setting, seed, budget
    protocol: Mapping[str, Any]

    @property
    def varied(self) -> list[Axis]:
        """The axes that have several values here, D first: Figure 4 has a curve for each."""
        there = [axis for axis in self.axes if len(axis.values) > 1]
        return sorted(there, key=lambda axis: axis.field != "model.diffusion_depth")

    @property
    def settings(self) -> list[tuple[Any, ...]]:
        return list(dict.fromkeys(point.setting for point in self.points))

    @property
    def kinds(self) -> list[list[Budget]]:
        """The budgets of each kind."""
        budgets = sorted({point.budget for point in self.points})
        kinds = [[b for b in budgets if b.kind == kind] for kind in SAMPLE_BUDGET_KINDS]
        return [kind for kind in kinds if kind]

    @property
    def budgets(self) -> list[Budget]:
        return [budget for kind in self.kinds for budget in kind]

    @property
    def scores(self) -> list[str]:
        """Names, kernel distances first: they are unbiased at any number of images."""
        names = dict.fromkeys(name for point in self.points for name in point.scores)
        ranks = ("KID", "FID", "FD", "recognised", "precision", "recall", "IS", "seam")
        return sorted(names, key=lambda name: (sort_position(name.partition("-")[0], ranks), name))

    def at(self, setting: tuple[Any, ...], budget: Budget | None = None) -> list[Point]:
        """The points of a setting, at one budget or at all."""
        return [p for p in self.points if p.setting == setting and budget in (None, p.budget)]

    @property
    def is_grid(self) -> bool:
        """Whether every value of an axis comes with every value of the others."""
        return len(self.settings) == math.prod(len(axis.values) for axis in self.axes)

    def label(self, setting: tuple[Any, ...]) -> str:
        """Its values; where the settings are no grid but a base and its ablations, those that are not the base's."""
        names = []
        for i, (axis, value) in enumerate(zip(self.axes, setting)):
            if self.is_grid and len(axis.values) > 1:
                names.append(f"{axis.label} = {value}")
            elif not self.is_grid and value != statistics.mode(other[i] for other in self.settings):
                names.append(_ablation_label(axis.label, value))
        return ", ".join(names) or "base"


def _ablation_label(label: str, value: Any) -> str:
    """Returns the name of a setting that differs from the base: a switch that is on or off, or any other value."""
    if isinstance(value, bool):  # 1 == True and 0 == False, but neither is a switch
        return label if value else f"no {label}"
    return f"{label} = {value}"


class Results(NamedTuple):
    """All that a sweep's folder holds."""

    name: str
    variant: str
    question: str
    runs: tuple[Mapping[str, Any], ...]  # the content of each result.json and its "folder", by setting and seed
    parts: tuple[ProtocolGroup, ...]
    missing: tuple[Mapping[str, Any], ...]  # of the plan's runs


# ---- means over seeds


class Estimate(NamedTuple):
    """A mean over seeds, with the interval that holds it in 95 of 100 repetitions; a single seed has none."""

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of values with Student's t interval: mean -+ t(0.975, n - 1) s / sqrt(n)."""
    x = tuple(values)
    mean = math.fsum(x) / len(x)
    if len(x) == 1:
        return Estimate(x, mean, None, None)
    half = _student_t_quantile(len(x) - 1) * statistics.stdev(x) / math.sqrt(len(x))
    return Estimate(x, mean, mean - half, mean + half)


@functools.cache
def _student_t_quantile(freedom: int) -> float:
    """What Student's t with so many degrees of freedom stays below in 97.5 of 100 draws."""
    from scipy import special  # a second to import

    return float(special.stdtrit(freedom, 0.975))


def score_sign(score: str) -> int:
    """1 where a larger score is the better one, else -1."""
    return 1 if score.partition("-")[0] in HIGHER_IS_BETTER else -1


# ---- reading


def load_results(workdir: str) -> Results:
    """The results of a sweep's folder.

    Raises:
      ConfigError: there are none, a file is damaged, or the runs differ in more than what the sweep varies.
    """
    plan = storage.read_json(os.path.join(workdir, "sweep.json")) or {}
    runs = _load_runs(workdir)
    if not runs:
        raise ConfigError(f"{workdir} holds no runs/*/result.json: --mode=sweep makes them.")
    sweeps = sorted({(run["sweep"], run["variant"]) for run in runs})
    if len(sweeps) > 1:
        raise ConfigError(
            f"{workdir} holds results of several sweeps, {sweeps[0]} and {sweeps[1]}: give each its folder."
        )
    trained, sampled = axes_lib.training_axes(runs, plan.get("runs", ())), axes_lib.sampling_axes(runs)
    _check_same_settings(runs, trained)
    axes = trained + sampled
    runs.sort(
        key=lambda run: (
            [sort_position(value_of(run, {}, axis.field), axis.values) for axis in trained],
            run["seed"],
            run["name"],
        )
    )
    apart = [axis for axis in axes if axis.field.startswith(_SEPARATED_SECTIONS)]
    parts = _group_by_protocol(runs, axes, apart)
    there = {run["name"] for run in runs}
    missing = tuple(run for run in plan.get("runs", ()) if run["name"] not in there)
    return Results(*sweeps[0], plan.get("question", ""), tuple(runs), tuple(parts), missing)


def _load_runs(workdir: str) -> list[dict[str, Any]]:
    root = epath.Path(workdir) / "runs"
    with storage.wrap_errors(f"{root} cannot be read"):
        folders = sorted(root.iterdir()) if root.exists() else []
    runs, default = [], fields.flat(config_lib.base())
    for folder in folders:
        path = folder / "result.json"
        run = sweep_folder.read_result(path)
        if run is None:  # of a run that goes on
            continue
        needed = ("name", "sweep", "variant", "seed", "overrides", "config", "training", "evaluations")
        if not isinstance(run, dict) or (lost := [name for name in needed if name not in run]):
            raise ConfigError(f"{path} is damaged: it has no {lost[0] if isinstance(run, dict) else 'fields'}.")
        run["folder"] = folder
        run["timing"] = storage.read_json(folder / "timing.json") or {}
        run["config"] = default | fields.flat(run["config"])
        for held in (run, *run["evaluations"]):
            held["overrides"] = fields.flat(held["overrides"])  # whose sequences are tuples
        runs.append(run)
    return runs


def sort_position(value: Any, values: Sequence[Any]) -> int:
    return values.index(value) if value in values else len(values)


# ---- points, by protocol


def _check_same_settings(runs: Sequence[Mapping[str, Any]], axes: Sequence[Axis]) -> None:
    """Whether what decides a training is the same in all runs, but for what the sweep varies; train fields in those of a setting."""
    swept = {name for run in runs for name in run["overrides"]}
    first: dict[Any, Mapping[str, Any]] = {}
    for run in runs:
        setting = tuple(value_of(run, {}, axis.field) for axis in axes)
        for other, sections in (
            (runs[0], ("model.", "loss.", "optimizer.")),
            (first.setdefault(setting, run), ("train.",)),
        ):
            for name, value in run["config"].items():
                counts = name.startswith(sections) and identity.affects_results(name) and name not in swept
                if counts and value != other["config"].get(name):
                    raise ConfigError(
                        f"runs {other['name']} and {run['name']} differ in {name}: {other['config'].get(name)!r} against "
                        f"{value!r}, which the sweep does not vary. Report each from a folder of its own."
                    )


def _group_by_protocol(
    runs: Sequence[Mapping[str, Any]], axes: Sequence[Axis], apart: Sequence[Axis]
) -> list[ProtocolGroup]:
    def trained(run: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(value_of(run, {}, axis.field) for axis in axes)

    timings = {  # of one seed, good for all
        (trained(run), overrides_key(one["overrides"])): one
        for run in runs
        for one in run["timing"].get("evaluations", ())
    }
    inside = [axis for axis in axes if axis not in apart]
    varied = [field for axis in inside for field in (axis.field, *axis.follows)]
    swept = {aliases.first_name(field).rpartition(".")[2] for field in varied if field.startswith("sample.")}
    points: dict[tuple[Any, ...], list[Point]] = {}
    protocols: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for place, evaluation in enumerate(run["evaluations"]):
            key = tuple(value_of(run, evaluation, axis.field) for axis in apart)
            protocol = _shared_protocol(evaluation["protocol"], swept)
            _check_same_protocol(protocols.setdefault(key, protocol), protocol, run["name"])
            cost = {name: float(evaluation["cost"][name]) for name in COSTS if name != "seconds"}
            if timing := timings.get((trained(run), overrides_key(evaluation["overrides"]))):
                cost["seconds"] = timing["fixed"] + timing["per_step"] * cost["solver_steps"]
            points.setdefault(key, []).append(
                Point(
                    tuple(value_of(run, evaluation, axis.field) for axis in inside), run["seed"],
                    Budget(evaluation["budget"]["kind"], evaluation["budget"]["asked"]), run["name"], place, cost,
                    {name: _parse_score(x) for name, x in evaluation["scores"].items()},
                )
            )  # fmt: skip
    parts = []
    for key in sorted(points, key=lambda key: [sort_key(x) for x in key]):
        name = ", ".join(f"{axis.label} = {value}" for axis, value in zip(apart, key))
        found = _sort_points(points[key], inside)
        _check_unique_points(found)
        parts.append(ProtocolGroup(name, tuple(_restrict_axes(inside, found)), tuple(found), protocols[key]))
    return parts


def overrides_key(overrides: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same for equal overrides."""
    named = aliases.current_names(fields.flat(overrides), "stored overrides")
    return tuple(sorted((name, repr(value)) for name, value in named.items()))


def _sort_points(points: Iterable[Point], axes: Sequence[Axis]) -> list[Point]:
    def place(point: Point) -> Any:
        return (
            [sort_position(x, axis.values) for x, axis in zip(point.setting, axes)],
            point.seed,
            point.budget,
            point.run,
        )

    return sorted(points, key=place)


def _restrict_axes(axes: Sequence[Axis], points: Sequence[Point]) -> Iterable[Axis]:
    """The axes with the values that a part has."""
    for i, axis in enumerate(axes):
        there = {point.setting[i] for point in points}
        yield axis._replace(values=tuple(value for value in axis.values if value in there))


def _parse_score(given: Any) -> Score:
    return (
        Score(given["value"], given.get("low"), given.get("high"))
        if isinstance(given, Mapping)
        else Score(float(given))
    )


def _shared_protocol(protocol: Mapping[str, Any], swept: Collection[str]) -> dict[str, Any]:
    """What scores must share to stand in one column."""
    varied = (*_PER_RUN_KEYS, *swept, *(_PROMPT_KEYS if "prompts" in swept else ()))
    images = {name: x for name, x in protocol["images"].items() if name not in varied}
    return {**{name: protocol.get(name) for name in _SHARED_PROTOCOL_KEYS}, "images": images}


def _check_same_protocol(ours: Mapping[str, Any], other: Mapping[str, Any], run: str) -> None:
    a, b = fields.flat(ours), fields.flat(other)
    for name in a | b:
        if a.get(name) != b.get(name):
            raise ConfigError(
                f"scores of different protocols do not share a column: {name} {a.get(name)!r} against {b.get(name)!r} of run "
                f"{run}. Evaluate all runs alike, or report them from folders of their own."
            )


def _check_unique_points(points: Sequence[Point]) -> None:
    seen: dict[Any, str] = {}
    for point in points:
        key = (point.setting, point.seed, point.budget)
        if key in seen:
            raise ConfigError(
                f"runs {seen[key]} and {point.run} are of the same setting, seed and budget ({point.budget}): remove one of them."
            )
        seen[key] = point.run


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Of a part's protocol: the same for scores that compare."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
