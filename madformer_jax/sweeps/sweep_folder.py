"""The folder of a sweep: its files, and the status of its runs.

`modes.sweep` writes these files. `run_table` and the reports read them.

sweep.json               the plan: question, protocol, budgets, and the name and overrides of every run
judges/HASH/             classifiers and reference of a data set, shared by all runs on it
logs/HOST_NUMBER.log     the log of each process that `processes` starts
claims/NAME/lock.json    the process that works on a run, judge or timing, with its heartbeat
timings/NAME.json        measured seconds of an image and of a solver step, shared by all seeds
runs/NAME/               workdir of a training and of its evaluations, and:
          result.json    the result of a finished run; interruptions do not change its bytes
          grid.png       samples of the first seed, a row for each of the result's `grid_rows`
          seconds.json   seconds of the training, and for each image of an evaluation, on a possibly busy machine
          timing.json    copy of timings/NAME.json
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
from etils import epath

from madformer_jax.config import aliases
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import lock, storage
from madformer_jax.sweeps import sweep_file
from madformer_jax.sweeps.sweep_file import Evaluation, Run, Sweep

# Significant digits of a loss curve. After an interruption, means are summed in another order.
CURVE_DIGITS = 6

# Fields of a result.json and of each of its evaluations.
_RESULT = ("name", "sweep", "variant", "seed", "overrides", "config", "training", "evaluations")
_EVALUATION = ("overrides", "budget", "cost", "protocol", "scores")


class Job(NamedTuple):
    """A sweep, expanded, and its folder."""

    name: str
    variant: str
    definition: Sweep
    runs: list[Run]
    evaluations: list[Evaluation]
    workdir: str
    base: Mapping[str, Any] = {}  # value of the base config for each field that the runs override

    def first_seed_run(self, run: Run) -> Run:
        """Returns the run with the first seed and otherwise equal overrides."""
        return next(other for other in self.runs if other.overrides_without_seed == run.overrides_without_seed)


def run_folder(workdir: str, run: Run) -> str:
    return os.path.join(workdir, "runs", run.name)


def reuse_folder_names(runs: Iterable[Run], workdir: str) -> list[Run]:
    """Returns the runs, each with the name of the folder that already holds a run of the same settings.

    Earlier versions named runs in other ways. Comparing the stored configs keeps their names valid.
    """
    root = epath.Path(workdir) / "runs"
    with storage.wrap_errors(f"{root} cannot be read"):
        folders = sorted(path.name for path in root.iterdir()) if root.exists() else []
    done: dict[str, str] = {}
    begun: dict[str, str] = {}
    for name in folders:
        result = storage.read_json_object(root / name / "result.json", "config")
        stored = result["config"] if result else storage.read_json_object(root / name / "config.json")
        if stored:
            (begun if result is None else done).setdefault(sweep_file.settings_hash(stored), name)
    known = begun | {name: name for name in folders if name in begun} | done
    return [run._replace(name=known.get(run.name, run.name)) for run in runs]


def claim_path(workdir: str, name: str) -> str:
    """Returns the folder of the lock that claims a run, a judge or a timing."""
    return os.path.join(workdir, "claims", name)


def has_result(workdir: str, name: str) -> bool:
    """Returns whether a run has a result, of any evaluations."""
    return (epath.Path(workdir) / "runs" / name / "result.json").exists()


def is_done(workdir: str, run: Run, evaluations: Iterable[Evaluation]) -> bool:
    """Returns whether the result of a run exists and has exactly these evaluations."""
    result = read_result(os.path.join(run_folder(workdir, run), "result.json"))
    if result is None:
        return False
    stored = [{name: x[name] for name in ("overrides", "budget")} for x in result["evaluations"]]
    # The round trip turns tuples into lists, as in the file.
    return stored == json.loads(json.dumps([evaluation.describe() for evaluation in evaluations]))


def read_result(path: epath.PathLike) -> dict[str, Any] | None:
    """Returns the content of a result.json, with the current names of fields; None if the file does not exist.

    Raises:
      ConfigError: The file is damaged.
    """
    result = storage.read_json_object(path, *_RESULT)
    if result is None:
        return None
    for i, evaluation in enumerate(result["evaluations"]):
        if absent := [name for name in _EVALUATION if name not in evaluation]:
            raise ConfigError(f"{path} is damaged: evaluation {i} has no field {absent[0]!r}.")
    for owner, name in ((result, "config"), *((x, "overrides") for x in (result, *result["evaluations"]))):
        owner[name] = aliases.current_names(owner[name], os.fspath(path))
    return result


def run_status(workdir: str, run: Run, evaluations: Iterable[Evaluation]) -> str:
    """Returns "done", "open" or "in progress at ..." with the process that works on the run."""
    if is_done(workdir, run, evaluations):
        return "done"
    holder = lock.holder(claim_path(workdir, run.name))
    return f"in progress at {holder}" if holder else "open"


def progress(job: Job) -> tuple[int, str]:
    """Returns the number of runs that are done, and a line with it and the step of each run in progress."""
    done, steps = 0, []
    for run in job.runs:
        if is_done(job.workdir, run, job.evaluations):
            done += 1
        elif lock.holder(claim_path(job.workdir, run.name)):
            lines, last = metric_lines(run_folder(job.workdir, run)), run.config.train.steps
            step = lines[-1]["step"] if lines else 0
            steps.append(f"{run.name} {'evaluates' if step == last else f'at step {step} of {last}'}")
    return done, "; ".join([f"{done} of {len(job.runs)} runs are done", *steps])


def metric_lines(folder: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl without torn ones: the last may still be written, or was cut by a kill."""
    path = epath.Path(folder) / "metrics.jsonl"
    with storage.wrap_errors(f"{path} cannot be read"):
        texts = path.read_text().splitlines() if path.exists() else []
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def plan_json(job: Job) -> dict[str, Any]:
    """Returns the content of sweep.json."""
    s = job.definition
    return {
        "sweep": job.name,
        "variant": job.variant,
        "question": s.question,
        "protocol": s.protocol and s.protocol.describe(),
        "train_budget": s.train_budget and {"kind": s.train_budget[0], "asked": s.train_budget[1]},
        "base": dict(job.base),
        "evaluations": [evaluation.describe() for evaluation in job.evaluations],
        "runs": [{"name": run.name, "overrides": run.overrides} for run in job.runs],
    }


# ---- metrics of a training


def loss_curve(lines: Iterable[Mapping[str, Any]], every: int) -> list[dict[str, float]]:
    """Averages the losses of metrics.jsonl over windows of `every` steps.

    An interruption may end a line of metrics.jsonl early; the windows do not depend on that.

    Returns:
      The last step and the mean losses of each window.
    """
    windows: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    before = 0
    for line in lines:
        if "loss" in line:
            windows.setdefault(-(-line["step"] // every), []).append((line["step"] - before, line))
            before = line["step"]
    return [{"step": rows[-1][1]["step"], **_window_means(rows)} for rows in windows.values()]


def _window_means(rows: list[tuple[int, Mapping[str, Any]]]) -> dict[str, float]:
    """Averages each loss over (number of steps, metrics) pairs, weighted by the number of steps."""
    names = sorted({name for _, line in rows for name in line if name.startswith("loss")})
    out = {}
    for name in names:
        values = [(n, line[name]) for n, line in rows if name in line]
        mean = math.fsum(n * value for n, value in values) / sum(n for n, _ in values)
        out[name] = float(f"{mean:.{CURVE_DIGITS}g}")
    return out


def held_out_losses(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the losses of the last validation (`train.validate_every`) and its number of images; {} without one."""
    validations = [line for line in lines if "validated" in line]
    if not validations:
        return {}
    losses = {
        name.removeprefix("validation_"): float(f"{value:.{CURVE_DIGITS}g}")
        for name, value in validations[-1].items()
        if name.startswith("validation_loss")
    }
    return {"held_out": losses, "held_out_images": validations[-1]["validated"]}


def training_seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    """Returns the seconds of the steps in metrics.jsonl, without compiling, saving and sampling."""
    seconds, before = 0.0, 0
    for line in lines:
        if line.get("steps_per_second"):
            seconds += (line["step"] - before) / line["steps_per_second"]
        before = line["step"]
    return seconds


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that decide the results, and the JAX platform."""
    names = ("madformer-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {name: metadata.version(name) for name in names} | {"platform": jax.default_backend()}
