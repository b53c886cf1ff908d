"""A sweep's folder: what is written there, and the state of its runs.

sweep.json               the plan: question, budgets, and the name and overrides of every run
judges/HASH/             classifier, reference and reader of captions' attributes of a data set, made once for all runs on it
claims/NAME/lock.json    the process that works on a run, a judge or a timing, with its sign of life
runs/NAME/               workdir of a training and of its evaluations, and
          result.json    what came out of it: there when the run is done; the same bytes however often it was interrupted
          grid.png       samples, a row for each evaluation in `grid_rows` of the result; of the first seed of each point
          seconds.json   how long training and evaluations took, whatever else the machine did
          timing.json    seconds of drawing an image on a quiet machine, where they were measured
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from madformer_jax.config import aliases, fields
from madformer_jax.cost import flops
from madformer_jax.runtime import lock, storage, stored_config
from madformer_jax.sweeps import sweep_file
from madformer_jax.sweeps.sweep_file import Evaluation, Run, Sweep

CURVE_DIGITS = 6  # of a figure of the curve: means of steps are added up in another order after an interruption


class Job(NamedTuple):
    """A sweep in a folder."""

    name: str
    variant: str
    definition: Sweep
    runs: list[Run]
    evaluations: list[Evaluation]
    workdir: str

    def first(self, run: Run) -> Run:
        """The run with the first seed at the same point."""
        return next(other for other in self.runs if other.point == run.point)


def run_folder(workdir: str, run: Run) -> str:
    return os.path.join(workdir, "runs", run.name)


def reuse_folder_names(runs: Iterable[Run], workdir: str) -> list[Run]:
    """Returns the runs, each with the name of the folder that already holds a run of the same settings.

    Names by which earlier versions knew a run thus stay valid: what is trained is compared by its stored config.
    """
    root = epath.Path(workdir) / "runs"
    with storage.wrap_errors(f"{root} cannot be read"):
        folders = sorted(path.name for path in root.iterdir()) if root.exists() else []
    done: dict[str, str] = {}
    begun: dict[str, str] = {}
    for name in folders:
        result = storage.read_json(root / name / "result.json")
        stored = result.get("config") if isinstance(result, dict) else storage.read_json(root / name / "config.json")
        if isinstance(stored, dict):
            (begun if result is None else done).setdefault(sweep_file.settings_hash(stored), name)
    known = begun | {name: name for name in folders if name in begun} | done
    return [run._replace(name=known.get(run.name, run.name)) for run in runs]


def claim_path(workdir: str, name: str) -> str:
    """Where a process says that it works on something."""
    return os.path.join(workdir, "claims", name)


def is_done(workdir: str, run: Run, evaluations: Iterable[Evaluation]) -> bool:
    """Whether a run's result is there, with all of these evaluations."""
    result = read_result(os.path.join(run_folder(workdir, run), "result.json"))
    if result is None:
        return False
    there = [{name: found[name] for name in ("overrides", "budget")} for found in result["evaluations"]]
    return there == json.loads(
        json.dumps([evaluation.describe() for evaluation in evaluations])
    )  # tuples are lists there


def read_result(path: epath.PathLike) -> Any:
    """Returns the content of a result.json, None where there is none.

    Results without "nfe" are from before `flops.model_passes` counted every layer: their "passes", in costs and budgets, are NFE.
    """
    result = storage.read_json(path)
    if isinstance(result, dict):
        result = _rename_fields(result, os.fspath(path))
    for evaluation in result.get("evaluations", ()) if isinstance(result, dict) else ():
        cost, asked = evaluation["cost"], evaluation["budget"]
        if "nfe" not in cost:
            sampled = fields.flat(evaluation["overrides"]) | {"sample.steps": cost["solver_steps"]}
            c = stored_config.config_from_saved(fields.flat(result["config"]) | sampled, os.fspath(path))
            passes = {"nfe": cost["passes"], "passes": flops.model_passes(c)}
            evaluation["cost"] = {"solver_steps": cost["solver_steps"], **passes, "flops": cost["flops"]}
            asked["kind"] = "nfe" if asked["kind"] == "passes" else asked["kind"]
    return result


def _rename_fields(result: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns a result with the current names of the fields in its config and in its overrides."""
    named: dict[str, Any] = {
        name: aliases.current_names(result[name], path) for name in ("config", "overrides") if name in result
    }
    if "evaluations" in result:
        named["evaluations"] = [
            evaluation | {"overrides": aliases.current_names(evaluation["overrides"], path)}
            for evaluation in result["evaluations"]
        ]
    return result | named


def run_status(workdir: str, run: Run, evaluations: Iterable[Evaluation]) -> str:
    """done, open, or who works on it."""
    if is_done(workdir, run, evaluations):
        return "done"
    holder = lock.holder(claim_path(workdir, run.name))
    return f"claimed by {holder}" if holder else "open"


def plan_json(job: Job) -> dict[str, Any]:
    s = job.definition
    return {
        "sweep": job.name,
        "variant": job.variant,
        "question": s.question,
        "train_budget": s.train_budget and {"kind": s.train_budget[0], "asked": s.train_budget[1]},
        "evaluations": [evaluation.describe() for evaluation in job.evaluations],
        "runs": [{"name": run.name, "overrides": run.overrides} for run in job.runs],
    }


# ---- what a training has told


def loss_curve(lines: Iterable[Mapping[str, Any]], every: int) -> list[dict[str, float]]:
    """The losses of metrics.jsonl: means over windows of `every` steps, wherever its lines were cut by interruptions.

    Returns:
      For each window its last step and each loss of its steps.
    """
    windows: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    before = 0
    for line in lines:
        if "loss" in line:
            windows.setdefault(-(-line["step"] // every), []).append((line["step"] - before, line))
            before = line["step"]
    return [{"step": found[-1][1]["step"], **_window_means(found)} for found in windows.values()]


def _window_means(found: list[tuple[int, Mapping[str, Any]]]) -> dict[str, float]:
    names = sorted({name for _, line in found for name in line if name.startswith("loss")})
    out = {}
    for name in names:
        there = [(n, line[name]) for n, line in found if name in line]
        mean = math.fsum(n * value for n, value in there) / sum(n for n, _ in there)
        out[name] = float(f"{mean:.{CURVE_DIGITS}g}")
    return out


def training_seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    """Of the steps in metrics.jsonl; compiling, saving and drawing are not in it."""
    seconds, before = 0.0, 0
    for line in lines:
        if line.get("steps_per_second"):
            seconds += (line["step"] - before) / line["steps_per_second"]
        before = line["step"]
    return seconds


def package_versions() -> dict[str, str]:
    """Of what decides the figures."""
    from importlib import metadata

    names = ("madformer-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {name: metadata.version(name) for name in names} | {"platform": jax.default_backend()}
