"""--mode=sweep: trains and evaluates every run of a sweep once.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/depth.py:digits --workdir=DIR

--dry_run only lists the runs. --measure only measures the seconds of sampling.

Any number of processes share DIR: each takes the next run that no other process has claimed
(`sweeps.sweep_folder` lists the files). After a kill, the same command resumes: a training from its
checkpoint, an evaluation from its finished shards. `--mode=report` reads the results.
"""

import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import judge, judge_paths, sampling_grid, score_summary
from madformer_jax.modes import benchmark, evaluate, reference, train
from madformer_jax.runtime import checkpoint, console, lock, malloc, partitioning, storage
from madformer_jax.sampling import generation, prompts
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.sweeps import budget, run_table, sweep_file, sweep_folder
from madformer_jax.sweeps.budget import Timing
from madformer_jax.sweeps.sweep_file import Evaluation, Run
from madformer_jax.sweeps.sweep_folder import Job

POLL_SECONDS = 10.0  # interval at which a process checks the runs that other processes work on
GRID_COLUMNS = 8  # images in a row of a run's sample grid
TIMED_STEPS = (4, 16)  # solver steps that are timed; other numbers follow by a straight line


def run(
    c: ConfigDict,
    workdir: str,
    *,
    file: sweep_file.ConfigFile,
    dry_run: bool = False,
    measure: bool = False,
) -> dict[str, Any]:
    """Completes all runs of a sweep and waits for those that other processes work on.

    Args:
      c: The base config: the result of the file's get_config with the changes of the command line.
      workdir: The sweep's folder.
      file: The executed sweep file.
      dry_run: If True, only prints a table of the runs.
      measure: If True, only measures the seconds of sampling an image for every combination of
        settings. The machine should be idle.

    Returns:
      The names of the runs under "runs", or the name of the run that was asked to stop under "stopped".

    Raises:
      ConfigError: The sweep is wrong, and nothing was done. Or some runs failed, and all others are
        done.
    """
    definition = sweep_file.load_sweep(file)
    name = os.path.splitext(os.path.basename(str(file.module.__file__)))[0]
    runs = sweep_folder.reuse_folder_names(sweep_file.expand_runs(definition, c), workdir)
    evaluations = sweep_file.expand_evaluations(definition)
    job = Job(name, "".join(file.args), definition, runs, evaluations, workdir)
    for run, evaluation in itertools.product(job.runs, job.evaluations):
        if evaluation.kind != "seconds":  # seconds are measured later
            sampled = sweep_file.apply_overrides(run.config, evaluation.overrides)
            budget.solver_steps(sampled, evaluation.kind, evaluation.amount)
    for run, overrides in itertools.product(job.runs, definition.evaluations):
        evaluate.check(_evaluation_config(run.config, overrides, [run.config.sample.steps]))
    storage.check_arrays_path(workdir, write=True)
    if dry_run:
        console.print_text(run_table.run_table(job))
        return {}
    if jax.process_index() == 0:
        with storage.wrap_errors(f"--workdir={workdir} cannot be written"):
            storage.write_json(os.path.join(workdir, "sweep.json"), sweep_folder.plan_json(job))
    if measure:
        for run in job.runs:
            _load_or_measure_timing(job, run, force=run is job.first_seed_run(run))
        return {}
    return _run_all(job)


def _run_all(job: Job) -> dict[str, Any]:
    """Claims and completes runs until all are done, by this process or by others."""
    failed: dict[str, str] = {}
    while waiting := [run for run in _rotate_runs(job.runs) if run.name not in failed and not _is_done(job, run)]:
        claimed = False
        for run in waiting:
            try:
                with lock.acquire(sweep_folder.claim_path(job.workdir, run.name)):
                    if _is_done(job, run):  # another process finished it before the lock was free
                        continue
                    claimed = True
                    logging.info(
                        "run %s, %d of %d: %s", run.name, job.runs.index(run) + 1, len(job.runs), run.overrides
                    )
                    if not _do_run(job, run):
                        return {"stopped": run.name}
            except ConfigError as error:
                if not isinstance(error, lock.LockedError):
                    logging.error("run %s failed: %s", run.name, error)
                    failed[run.name] = str(error)
                if not partitioning.all_failed():
                    raise
            finally:
                _free_memory()
        if not claimed:
            logging.info("waiting for %d runs that other processes work on", len(waiting))
            time.sleep(POLL_SECONDS)
    if failed:
        name, reason = next(iter(failed.items()))
        raise ConfigError(f"{len(failed)} of {len(job.runs)} runs failed, {name} among them: {reason}")
    logging.info("all %d runs are done: %s", len(job.runs), job.workdir)
    return {"runs": [run.name for run in job.runs]}


def _rotate_runs(runs: list[Run]) -> list[Run]:
    """Rotates the runs by the index of this process in a job array (MADFORMER_INDEX).

    Processes that start together then begin with different runs.
    """
    first = int(os.environ.get("MADFORMER_INDEX") or 0) % len(runs)
    return runs[first:] + runs[:first]


def _is_done(job: Job, run: Run) -> bool:
    """Returns whether a run is done; all JAX processes get the answer of the first."""
    return _broadcast(jax.process_index() == 0 and sweep_folder.is_done(job.workdir, run, job.evaluations))


def _broadcast(value: bool) -> bool:
    """Returns the first JAX process's value in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def _free_memory() -> None:
    """Frees the memory of the previous run."""
    jax.clear_caches()
    gc.collect()
    malloc.trim()


# ---- one run


def _do_run(job: Job, run: Run) -> bool:
    """Trains and evaluates a run and writes its result.

    Returns:
      False if the training was asked to stop.
    """
    folder = sweep_folder.run_folder(job.workdir, run)
    base = _judge_config(run.config, job.workdir, folder)  # before the training, so that errors come early
    if not _is_trained(run.config, folder):
        if "stopped" in train.run(run.config.copy_and_resolve_references(), folder, grids=False):
            return False
        _free_memory()
    evaluations = _evaluate(job, run, base)
    rows = _grid_rows(job, evaluations) if run is job.first_seed_run(run) else []
    if rows:
        _write_sample_grid(job, run, [evaluations[i]["cost"]["solver_steps"] for i in rows])
    if jax.process_index():
        return True
    lines = [json.loads(line) for line in (epath.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    storage.write_json(os.path.join(folder, "seconds.json"), _phase_seconds(lines, evaluations))
    storage.write_json(os.path.join(folder, "result.json"), _run_result(job, run, lines, evaluations, rows))
    _remove_checkpoints(run.config, folder)
    return True


def _is_trained(c: ConfigDict, folder: str) -> bool:
    return checkpoint.complete_steps(folder)[-1:] == [c.train.steps]


def _solver_steps(job: Job, run: Run, evaluation: Evaluation) -> int:
    c = sweep_file.apply_overrides(run.config, evaluation.overrides)
    timing = (
        _load_or_measure_timing(job, run)[job.definition.evaluations.index(evaluation.overrides)]
        if evaluation.kind == "seconds"
        else None
    )
    return budget.solver_steps(c, evaluation.kind, evaluation.amount, timing)


def _evaluate(job: Job, run: Run, base: ConfigDict) -> list[dict[str, Any]]:
    """Returns a result of --mode=evaluate for each evaluation, averaged over checkpoints."""
    by_settings: dict[Any, dict[str, Any]] = {}  # (index of the overrides, solver steps) -> result
    keys = [(job.definition.evaluations.index(e.overrides), _solver_steps(job, run, e)) for e in job.evaluations]
    for i, overrides in enumerate(job.definition.evaluations):
        steps = sorted({steps for j, steps in keys if j == i})
        folder = sweep_folder.run_folder(job.workdir, run)
        results = evaluate.run(_evaluation_config(base, overrides, steps), folder)["results"]
        means = score_summary.mean_over_checkpoints(results) or results
        by_settings |= zip(((i, n) for n in steps), means, strict=True)
    return [by_settings[key] for key in keys]


def _evaluation_config(c: ConfigDict, overrides: sweep_file.Overrides, steps: Sequence[int]) -> ConfigDict:
    """Returns the config that evaluates a run with these overrides at these numbers of solver steps."""
    c = sweep_file.apply_overrides(c, overrides)
    c.evaluate.grid = f"steps={','.join(map(str, steps))}"
    return c


def _run_result(
    job: Job, run: Run, lines: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], rows: list[int]
) -> Any:
    """Returns the content of a run's result.json."""
    c = run.config
    curve = sweep_folder.loss_curve(lines, c.train.log_every)
    evaluations = []
    for evaluation, result in zip(job.evaluations, results, strict=True):
        cost = {name: value for name, value in result["cost"].items() if name != "seconds"}
        real = {x: result["real"][x] for x in ("scores", "protocol")} if "real" in result else None
        scores = {x: result[x] for x in ("scores", "protocol")}
        evaluations.append(evaluation.describe() | {"cost": cost} | scores | ({"real": real} if real else {}))
    return {
        "name": run.name,
        "sweep": job.name,
        "variant": job.variant,
        "seed": c.seed,
        "overrides": run.overrides,
        "config": sweep_file.changed_settings(c),
        "training": {
            "steps": c.train.steps,
            "images": c.train.steps * c.train.batch,
            "flops": budget.training_flops(c),
            "final_loss": curve[-1]["loss"],
            "curve": curve,
            **sweep_folder.held_out_losses(lines),
        },
        "evaluations": evaluations,
        "grid": "grid.png" if rows else None,
        "grid_rows": rows,
        "versions": sweep_folder.package_versions(),
    }


def _phase_seconds(lines: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns seconds.json of a run: seconds of the training, and of an image in each evaluation."""
    return {
        "training": sweep_folder.training_seconds(lines),
        "evaluations": [result["cost"]["seconds"] for result in results],
    }


def _remove_checkpoints(c: ConfigDict, folder: str) -> None:
    """Removes the checkpoints that no evaluation needs.

    The others stay, since a later command may add budgets. Snapshots of averages stay, too.
    """
    steps = checkpoint.complete_steps(folder)
    snapshots = {step for step in steps if c.train.ema_snapshots and step % c.train.ema_snapshots == 0}
    for step in set(steps) - set(sampling_grid.select_checkpoints(c.evaluate.checkpoints, steps)) - snapshots:
        (checkpoint.folder(folder) / str(step)).rmtree()


# ---- judges and timings, which runs share


def _make_once(workdir: str, name: str, path: str, make: Callable[[], Any]) -> None:
    """Makes a file once: one process calls `make`, which writes `path`, and the others wait.

    Args:
      workdir: The sweep's folder.
      name: Name of the claim.
      path: The file.
      make: Writes the file.
    """
    while not _exists(path):
        try:
            with lock.acquire(sweep_folder.claim_path(workdir, name)):
                if not _exists(path):
                    make()
        except lock.LockedError:
            logging.info("waiting for another process to make %s", path)
            time.sleep(POLL_SECONDS)


def _exists(path: str) -> bool:
    return _broadcast(jax.process_index() == 0 and epath.Path(path).exists())


def _judge_config(c: ConfigDict, workdir: str, folder: str) -> ConfigDict:
    """Returns the config of a run with the paths of its judge.

    Makes the judge first if the config does not name a reference. A model whose captions name
    attributes gets an attribute classifier, too.

    Args:
      c: The config of the run.
      workdir: The sweep's folder.
      folder: The run's folder.

    Raises:
      ConfigError: The judge cannot be made, or the reference that the config names does not open.
    """
    c = c.copy_and_resolve_references()
    if c.evaluate.reference:
        judge.open_judge(c, folder, c.evaluate.n)
        return c
    name = sweep_file.judge_hash(c)
    judge_folder = os.path.join(workdir, "judges", name)
    path = judge_paths.reference_path(c, judge_folder)
    _make_once(workdir, f"judge_{name}", path, lambda: reference.run(c.copy_and_resolve_references(), judge_folder))
    # Not part of the judge above: a run without captions may have made that one.
    if prompts.names_attributes(c):
        classifier = judge_paths.attribute_classifier_path(c, judge_folder)
        _make_once(workdir, f"judge_{name}", classifier, lambda: reference.make_attribute_classifier(c, classifier))
    c.evaluate.reference, c.evaluate.network_path = path, judge_paths.network_path(c, judge_folder)
    return c


def _load_or_measure_timing(job: Job, run: Run, force: bool = False) -> list[Timing]:
    """Returns the timing of each of the sweep's evaluations for a run.

    Measures it unless an earlier measurement exists. `force` measures it again.
    """
    name = job.first_seed_run(run).name  # one measurement serves all seeds
    path = os.path.join(job.workdir, "timings", f"{name}.json")
    if force and jax.process_index() == 0:
        epath.Path(path).unlink(missing_ok=True)
    _make_once(
        job.workdir,
        f"timing_{name}",  # `name` alone is the claim of the run
        path,
        lambda: storage.write_json(path, [_measure_timing(job, run, o) for o in job.definition.evaluations]),
    )
    timings = storage.read_json(path)
    if jax.process_index() == 0:  # a copy in the run's folder, which makes that folder complete
        copy = os.path.join(sweep_folder.run_folder(job.workdir, run), "timing.json")
        storage.write_json(copy, {"evaluations": timings})
    return [Timing(timing["fixed"], timing["per_step"]) for timing in timings]


def _measure_timing(job: Job, run: Run, overrides: sweep_file.Overrides) -> dict[str, Any]:
    c = sweep_file.apply_overrides(run.config, overrides)
    few, many = TIMED_STEPS
    figures = [benchmark.sampling(c) for c.sample.steps in TIMED_STEPS]
    seconds = [x["seconds_per_image"] for x in figures]
    per_step = (seconds[1] - seconds[0]) / (many - few)
    fixed = seconds[0] - few * per_step
    logging.info(
        "%s %s: %.3g s an image and %.3g s a step", run.overrides_without_seed, dict(overrides), fixed, per_step
    )
    return {"overrides": dict(overrides), "fixed": fixed, "per_step": per_step, "batch": figures[0]["batch"]}


# ---- samples side by side


def _grid_rows(job: Job, results: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the evaluations that are rows of the sample grid.

    They are those with the first overrides, one for each number of solver steps, cheapest first.
    """
    index: dict[int, int] = {}  # solver steps -> evaluation
    for i, (evaluation, result) in enumerate(zip(job.evaluations, results, strict=True)):
        if evaluation.overrides == job.definition.evaluations[0]:
            index.setdefault(result["cost"]["solver_steps"], i)
    return [index[steps] for steps in sorted(index)]


def _write_sample_grid(job: Job, run: Run, steps: Sequence[int]) -> None:
    """Writes the first images to grid.png, a row for each number of solver steps.

    The batch size is that of the evaluation, whose compiled programs are used again.
    """
    c = sweep_file.apply_overrides(run.config, job.definition.evaluations[0])
    c.sample.n = c.evaluate.n
    folder = sweep_folder.run_folder(job.workdir, run)
    trained = TrainedModel.open(c, folder, step=-1)
    config_lib.resolve_label_numbers(c, trained.class_names)
    with partitioning.scope(trained.mesh):
        codec_params = trained.load_codec_params()
        rows = []
        for c.sample.steps in steps:
            network, params = trained.sampled(c)
            sample_fn = generation.make_sample_fn(c, network, trained.codec.decode)
            batches = generation.batches(
                c, sample_fn, params, codec_params, trained.mesh, range(GRID_COLUMNS), max_batch=c.sample.n
            )
            rows.append(np.concatenate([batch.images for batch in batches])[:GRID_COLUMNS])
    if jax.process_index() == 0:
        generation.write_png(os.path.join(folder, "grid.png"), generation.tile_rows(np.stack(rows)))
