"""The results of a sweep: its axes, its points, and means over training seeds with intervals.

`load_results` reads runs/*/result.json and timing.json of a sweep's folder, and finds missing runs with
sweep.json (`sweeps.sweep_folder` describes the files). `tables`, `figures` and `sample_strips` use the
`Results`. If larger values of a new score are better, add the score to `HIGHER_IS_BETTER`.
"""

import hashlib
import json
import math
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from madformer_jax.config import aliases, fields
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError
from madformer_jax.reports import axes as axes_lib
from madformer_jax.reports import run_checks
from madformer_jax.reports.axes import Axis, sort_key, value_of
from madformer_jax.reports.intervals import Estimate, estimate
from madformer_jax.runtime import storage
from madformer_jax.sweeps import sweep_folder
from madformer_jax.sweeps.budget import SAMPLE_BUDGET_KINDS

COSTS = {  # of an image: key -> label
    "solver_steps": "solver steps",
    "nfe": "NFE",
    "passes": "full-model passes",
    "flops": "FLOPs",
    "seconds": "seconds",
}
HIGHER_IS_BETTER = ("IS", "precision", "recall", "recognised", "memorisation", "attributes", "LPIPS")
SHARES = ("precision", "recall", "recognised", "memorized", "attributes")  # scores within [0, 1]
_SHARED_PROTOCOL_KEYS = ("n", "reference", "network", "image", "scores")  # keys of a protocol
# keys of protocol["images"] that differ between runs
_PER_RUN_KEYS = ("step", "fingerprint", "seed", "steps", "diffusion")
_PROMPT_KEYS = ("asked", "tokens")  # keys of protocol["images"] that follow from its "prompts"
_UNITS = {  # unit of a budget, singular and plural
    "steps": ("step", "steps"),
    "nfe": ("NFE", "NFE"),
    "passes": ("pass", "passes"),
    "flops": ("FLOPs", "FLOPs"),
    "seconds": ("second", "seconds"),
}
# Scores of runs that differ in a field of these sections are not comparable: they get separate tables.
_SEPARATED_SECTIONS = ("data.", "codec.", "evaluate.")


class Budget(NamedTuple):
    """A sampling budget of one image. `kind` is one of `budget.SAMPLE_BUDGET_KINDS`."""

    kind: str
    amount: float

    @property
    def unit(self) -> str:
        return _UNITS[self.kind][1]

    def __str__(self) -> str:
        if self.kind == "flops":
            return f"{self.amount / 1e9:.4g} GFLOPs"
        singular, plural = _UNITS[self.kind]
        return f"{self.amount:.4g} {singular if self.amount == 1 else plural}"


class Score(NamedTuple):
    """A score of one set of images, with its bootstrap interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    real: Estimate | None = None  # the score of real images at the same n, if it was stored


class Point(NamedTuple):
    """The scores of one trained model at one budget."""

    setting: tuple[Any, ...]  # the value of each axis
    seed: int  # of the training
    budget: Budget
    run: str  # name of the run
    evaluation_index: int  # index among the run's evaluations
    cost: Mapping[str, float]  # of an image; keys of `COSTS`
    scores: Mapping[str, Score]  # name -> score


class ProtocolGroup(NamedTuple):
    """The points that share a protocol, and so are comparable."""

    name: str  # difference from the other groups, such as "image size = 32"; empty for a single group
    axes: tuple[Axis, ...]  # with the values that the group has
    points: tuple[Point, ...]  # sorted by setting, seed and budget
    protocol: Mapping[str, Any]  # shared by all points
    data: str = ""  # name and size of the images, such as "digits, 32 px"
    key: Mapping[str, Any] = {}  # the fields that separate this group from others, with their values
    base_values: Mapping[str, Any] = {}  # of the sweep's base config, as far as they are known

    @property
    def varying_axes(self) -> list[Axis]:
        """The axes with several values, D first: the paper's Figure 4 has a curve for each D."""
        varying = [axis for axis in self.axes if len(axis.values) > 1]
        return sorted(varying, key=lambda axis: axis.field != "model.diffusion_depth")

    @property
    def settings(self) -> list[tuple[Any, ...]]:
        return list(dict.fromkeys(point.setting for point in self.points))

    @property
    def budgets_by_kind(self) -> list[list[Budget]]:
        """The budgets, sorted, in a list for each kind."""
        budgets = sorted({point.budget for point in self.points})
        kinds = [[b for b in budgets if b.kind == kind] for kind in SAMPLE_BUDGET_KINDS]
        return [kind for kind in kinds if kind]

    @property
    def budgets(self) -> list[Budget]:
        return [budget for kind in self.budgets_by_kind for budget in kind]

    @property
    def scores(self) -> list[str]:
        """Names of the scores, kernel distances first: those are unbiased at any number of images."""
        names = dict.fromkeys(name for point in self.points for name in point.scores)
        ranks = ("KID", "FID", "FD", "recognised", "precision", "recall", "IS", "seam")
        return sorted(names, key=lambda name: (sort_position(name.partition("-")[0], ranks), name))

    def points_at(self, setting: tuple[Any, ...], budget: Budget | None = None) -> list[Point]:
        """Returns the points of a setting at one budget, or at all budgets."""
        return [p for p in self.points if p.setting == setting and budget in (None, p.budget)]

    @property
    def base(self) -> tuple[Any, ...]:
        """The most frequent value of each axis; of several, that of the base config. It need not be a setting."""
        columns = [[setting[i] for setting in self.settings] for i in range(len(self.axes))]
        frequent = [(axis, statistics.multimode(column)) for axis, column in zip(self.axes, columns)]
        named = [(self.base_values.get(axis.field), values) for axis, values in frequent]
        return tuple(value if value in values else values[0] for value, values in named)

    @property
    def is_grid(self) -> bool:
        """True if every combination of values of the axes is present."""
        return len(self.settings) == math.prod(len(axis.values) for axis in self.axes)

    def label(self, setting: tuple[Any, ...]) -> str:
        """Returns the name of a setting in tables and figures.

        It lists the values of the axes. If the settings are a base and its ablations instead of a grid,
        it lists only the values that differ from the base.
        """
        names = []
        for axis, value, base in zip(self.axes, setting, self.base):
            if self.is_grid and len(axis.values) > 1:
                names.append(f"{axis.label} = {value}")
            elif not self.is_grid and value != base:
                names.append(_ablation_label(axis.label, value))
        return ", ".join(names) or "base"


def _ablation_label(label: str, value: Any) -> str:
    """Returns the name of a value that differs from the base."""
    if isinstance(value, bool):  # not `value in (True, False)`: the numbers 1 and 0 equal them
        return label if value else f"no {label}"
    return f"{label} = {value}"


class Results(NamedTuple):
    """The results in a sweep's folder."""

    name: str  # of the sweep file
    variant: str
    question: str
    runs: tuple[Mapping[str, Any], ...]  # content of each result.json and its "folder", sorted by setting and seed
    groups: tuple[ProtocolGroup, ...]
    missing: tuple[Mapping[str, Any], ...]  # runs of the plan without a result
    protocol: Mapping[str, Any] | None  # content of `sweeps.protocol.Protocol`, or None if the sweep has none
    base: Mapping[str, Any] = {}  # value of the base config for each field that the runs override


# ---- scores


def score_sign(score: str) -> int:
    """Returns 1 if larger values of a score are better, else -1."""
    return 1 if score.partition("-")[0] in HIGHER_IS_BETTER else -1


def score_estimate(points: Iterable[Point], score: str) -> Estimate | None:
    """Returns the mean of a score over seeds; the interval of a share stays within [0, 1]."""
    values = [point.scores[score].value for point in points if score in point.scores]
    if not values:
        return None
    x = estimate(values)
    if x.low is None or x.high is None or score.partition("-")[0] not in SHARES:
        return x
    return x._replace(low=max(0.0, x.low), high=min(1.0, x.high))


# ---- reading


def load_results(workdir: str) -> Results:
    """Reads the results in a sweep's folder.

    Raises:
      ConfigError: The folder has no results, a file is damaged, or the runs are not comparable.
    """
    plan = storage.read_json_object(os.path.join(workdir, "sweep.json")) or {}
    runs = [run for run in _load_runs(workdir) if run_checks.belongs_to_plan(run, plan)]
    if not runs:
        raise ConfigError(f"{workdir} holds no runs/*/result.json: run --mode=sweep with this workdir first.")
    sweeps = sorted({(run["sweep"], run["variant"]) for run in runs})
    if len(sweeps) > 1 and "sweep" not in plan:
        raise ConfigError(
            f"{workdir} holds results of several sweeps, {sweeps[0]} and {sweeps[1]}: move each to a folder of its own."
        )
    name, variant = (plan["sweep"], plan["variant"]) if "sweep" in plan else sweeps[0]
    trained, sampled = axes_lib.training_axes(runs, plan.get("runs", ())), axes_lib.sampling_axes(runs)
    run_checks.check_same_settings(runs, trained)
    axes = trained + sampled

    def key(run: Mapping[str, Any]) -> Any:
        setting = [sort_position(value_of(run, {}, axis.field), axis.values) for axis in trained]
        return setting, run["seed"], run["name"]

    runs.sort(key=key)
    separating = [axis for axis in axes if axis.field.startswith(_SEPARATED_SECTIONS)]
    base = aliases.current_names(fields.flat(plan.get("base", {})), "sweep.json")
    groups = [group._replace(base_values=base) for group in _group_by_protocol(runs, axes, separating)]
    finished = {run["name"] for run in runs}
    missing = tuple(run for run in plan.get("runs", ()) if run["name"] not in finished)
    question, protocol = plan.get("question", ""), plan.get("protocol")
    return Results(name, variant, question, tuple(runs), tuple(groups), missing, protocol, base)


def _load_runs(workdir: str) -> list[dict[str, Any]]:
    root = epath.Path(workdir) / "runs"
    with storage.wrap_errors(f"{root} cannot be read"):
        folders = sorted(root.iterdir()) if root.exists() else []
    runs, default = [], fields.flat(config_lib.base())
    for folder in folders:
        run = sweep_folder.read_result(folder / "result.json")
        if run is None:  # the run is not finished
            continue
        run["folder"] = folder
        run["timing"] = storage.read_json_object(folder / "timing.json") or {}
        run["config"] = default | fields.flat(run["config"])
        for owner in (run, *run["evaluations"]):
            owner["overrides"] = fields.flat(owner["overrides"])  # turns lists into tuples
        runs.append(run)
    return runs


def sort_position(value: Any, values: Sequence[Any]) -> int:
    """Returns the index of a value; unknown values come last."""
    return values.index(value) if value in values else len(values)


# ---- points, by protocol


def _group_by_protocol(
    runs: Sequence[Mapping[str, Any]], axes: Sequence[Axis], separating: Sequence[Axis]
) -> list[ProtocolGroup]:
    """Collects the points of the runs in one group for each combination of values of `separating`.

    Raises:
      ConfigError: Scores within a group have different protocols, or two runs have the same point.
    """

    def trained(run: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(value_of(run, {}, axis.field) for axis in axes)

    timings = {  # measured for one seed, valid for all
        (trained(run), overrides_key(timing["overrides"])): timing
        for run in runs
        for timing in run["timing"].get("evaluations", ())
    }
    inside = [axis for axis in axes if axis not in separating]
    varied = [field for axis in inside for field in (axis.field, *axis.dependent_fields)]
    swept = {aliases.first_name(field).rpartition(".")[2] for field in varied if field.startswith("sample.")}
    points: dict[tuple[Any, ...], list[Point]] = {}
    protocols: dict[tuple[Any, ...], dict[str, Any]] = {}
    data: dict[tuple[Any, ...], str] = {}
    for run in runs:
        for i, evaluation in enumerate(run["evaluations"]):
            key = tuple(value_of(run, evaluation, axis.field) for axis in separating)
            protocol = _shared_protocol(evaluation["protocol"], swept)
            run_checks.check_same_protocol(protocols.setdefault(key, protocol), protocol, run["name"])
            data[key] = f"{run['config']['data.source']}, {run['config']['data.image_size']} px"
            cost = {name: float(evaluation["cost"][name]) for name in COSTS if name != "seconds"}
            if timing := timings.get((trained(run), overrides_key(evaluation["overrides"]))):
                cost["seconds"] = timing["fixed"] + timing["per_step"] * cost["solver_steps"]
            points.setdefault(key, []).append(
                Point(
                    tuple(value_of(run, evaluation, axis.field) for axis in inside), run["seed"],
                    Budget(evaluation["budget"]["kind"], evaluation["budget"]["asked"]), run["name"], i, cost,
                    _parse_scores(evaluation),
                )
            )  # fmt: skip
    groups = []
    for key in sorted(points, key=lambda key: [sort_key(x) for x in key]):
        name = ", ".join(f"{axis.label} = {value}" for axis, value in zip(separating, key))
        ordered = _sort_points(points[key], inside)
        _check_unique_points(ordered)
        restricted = tuple(_restrict_axes(inside, ordered))
        fields_of_key = {axis.field: value for axis, value in zip(separating, key)}
        groups.append(ProtocolGroup(name, restricted, tuple(ordered), protocols[key], data[key], fields_of_key))
    return groups


def overrides_key(overrides: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns a hashable key that is equal for equal overrides."""
    named = aliases.current_names(fields.flat(overrides), "stored overrides")
    return tuple(sorted((name, repr(value)) for name, value in named.items()))


def _sort_points(points: Iterable[Point], axes: Sequence[Axis]) -> list[Point]:
    def key(point: Point) -> Any:
        setting = [sort_position(x, axis.values) for x, axis in zip(point.setting, axes)]
        return setting, point.seed, point.budget, point.run

    return sorted(points, key=key)


def _restrict_axes(axes: Sequence[Axis], points: Sequence[Point]) -> Iterable[Axis]:
    """Yields the axes with only those values that occur in the points."""
    for i, axis in enumerate(axes):
        present = {point.setting[i] for point in points}
        yield axis._replace(values=tuple(value for value in axis.values if value in present))


def _parse_scores(evaluation: Mapping[str, Any]) -> dict[str, Score]:
    real = evaluation.get("real", {}).get("scores", {})
    scores = {name: _parse_score(x, real.get(name)) for name, x in evaluation["scores"].items()}
    return {name: x for name, x in scores.items() if math.isfinite(x.value)}  # as if the others were not computed


def _parse_score(x: Any, real: Mapping[str, Any] | None) -> Score:
    """Parses a score, with that of real images. Older results hold the latter for seams alone, without an interval."""
    if not isinstance(x, Mapping):
        return Score(float(x))
    real = real or ({"value": x["real"]} if "real" in x else None)
    floor = Estimate((real["value"],), real["value"], real.get("low"), real.get("high")) if real else None
    return Score(x["value"], x.get("low"), x.get("high"), floor)


def _shared_protocol(protocol: Mapping[str, Any], swept: Collection[str]) -> dict[str, Any]:
    """Returns the part of a protocol that scores in one column must share."""
    varied = (*_PER_RUN_KEYS, *swept, *(_PROMPT_KEYS if "prompts" in swept else ()))
    images = {name: x for name, x in protocol["images"].items() if name not in varied}
    return {**{name: protocol.get(name) for name in _SHARED_PROTOCOL_KEYS}, "images": images}


def _check_unique_points(points: Sequence[Point]) -> None:
    seen: dict[Any, str] = {}
    for point in points:
        key = (point.setting, point.seed, point.budget)
        if key in seen:
            raise ConfigError(
                f"runs {seen[key]} and {point.run} have the same setting, seed and budget ({point.budget}): remove one of them."
            )
        seen[key] = point.run


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Returns a hash of a protocol, which is equal for comparable scores."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
