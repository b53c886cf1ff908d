"""--mode=sweep: trains and judges every run of a sweep, each once.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/depth.py:digits --workdir=DIR [--dry_run | --measure]

Any number of processes share DIR (`testbed.layout`): each takes the next run that nobody works on. Killed, the same command
goes on: training from its checkpoint, an evaluation from its parts.
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
from madformer_jax.evaluation import judge, judge_paths, sample_scores, sampling_grid
from madformer_jax.models import madformer
from madformer_jax.modes import benchmark, evaluate, reference, train
from madformer_jax.runtime import checkpoint, console, lock, malloc, partitioning, storage
from madformer_jax.sampling import codec, generation, prompts
from madformer_jax.sweeps import budget, run_table, sweep_file, sweep_folder
from madformer_jax.sweeps.budget import Timing
from madformer_jax.sweeps.sweep_file import Evaluation, Run
from madformer_jax.sweeps.sweep_folder import Job

POLL_SECONDS = 10.0  # seconds between two looks at what others work on
GRID_COLUMNS = 8  # images in a row of a run's grid
TIMED_STEPS = (4, 16)  # solver steps whose seconds give those of any other number


def run(
    c: ConfigDict,
    workdir: str,
    *,
    file: sweep_file.ConfigFile,
    dry_run: bool = False,
    measure: bool = False,
) -> dict[str, Any]:
    """Does all runs that are not done, or waits for those that others do.

    Args:
      c: the base, which get_config of the file returned, with the command line's changes.
      workdir: the sweep's folder.
      file: the config file, which has been run.
      dry_run: only print a table of the runs.
      measure: only measure the seconds of drawing an image, for every point: on a quiet machine.

    Raises:
      ConfigError: the sweep is wrong; then nothing is done. Or some runs failed; then all others are done.
    """
    definition = sweep_file.load_sweep(file)
    name = os.path.splitext(os.path.basename(str(file.module.__file__)))[0]
    runs = sweep_folder.reuse_folder_names(sweep_file.expand_runs(definition, c), workdir)
    evaluations = sweep_file.expand_evaluations(definition)
    job = Job(name, "".join(file.args), definition, runs, evaluations, workdir)
    for run, evaluation in itertools.product(job.runs, job.evaluations):
        if evaluation.kind != "seconds":  # which are not known yet
            budget.solver_steps(
                sweep_file.apply_overrides(run.config, evaluation.overrides), evaluation.kind, evaluation.asked
            )
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
            _load_or_measure_timing(job, run, anew=run is job.first(run))
        return {}
    return _run_all(job)


def _run_all(job: Job) -> dict[str, Any]:
    """Every run once, by whichever process comes first."""
    failed: dict[str, str] = {}
    while waiting := [run for run in _rotate_runs(job.runs) if run.name not in failed and not _is_done(job, run)]:
        worked = False
        for run in waiting:
            try:
                with lock.acquire(sweep_folder.claim_path(job.workdir, run.name)):
                    if _is_done(job, run):  # meanwhile
                        continue
                    worked = True
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
        if not worked:
            logging.info("waiting for %d runs that others work on", len(waiting))
            time.sleep(POLL_SECONDS)
    if failed:
        name, why = next(iter(failed.items()))
        raise ConfigError(f"{len(failed)} of {len(job.runs)} runs failed, {name} among them: {why}")
    logging.info("all %d runs are done: %s", len(job.runs), job.workdir)
    return {"runs": [run.name for run in job.runs]}


def _rotate_runs(runs: list[Run]) -> list[Run]:
    """The runs from the one of this process's number on, if it has one of an array: fewer meet at the start."""
    first = int(os.environ.get("MADFORMER_INDEX") or 0) % len(runs)
    return runs[first:] + runs[:first]


def _is_done(job: Job, run: Run) -> bool:
    """As the first process of this job sees it."""
    found = jax.process_index() == 0 and sweep_folder.is_done(job.workdir, run, job.evaluations)
    return bool(multihost_utils.broadcast_one_to_all(np.array(found))) if jax.process_count() > 1 else found


def _free_memory() -> None:
    """Memory of the run before."""
    jax.clear_caches()
    gc.collect()
    malloc.trim()


# ---- one run


def _do_run(job: Job, run: Run) -> bool:
    """Trains and judges, and writes the result; False where the training was asked to stop."""
    folder = sweep_folder.run_folder(job.workdir, run)
    base = _judge_config(run.config, job.workdir, folder)  # whose errors come before hours of training
    if not _is_trained(run.config, folder):
        if "stopped" in train.run(run.config.copy_and_resolve_references(), folder, grids=False):
            return False
        _free_memory()
    found = _evaluate(job, run, base)
    rows = _grid_steps(job, found) if run is job.first(run) else []
    if rows:
        _write_sample_grid(job, run, [found[i]["cost"]["solver_steps"] for i in rows])
    if jax.process_index():
        return True
    lines = [json.loads(line) for line in (epath.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    storage.write_json(os.path.join(folder, "seconds.json"), _phase_seconds(run, lines, found))
    storage.write_json(os.path.join(folder, "result.json"), _run_result(job, run, lines, found, rows))
    _remove_checkpoints(run.config, folder)
    return True


def _is_trained(c: ConfigDict, folder: str) -> bool:
    if not checkpoint.exists(folder):
        return False
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.last == c.train.steps


def _solver_steps(job: Job, run: Run, evaluation: Evaluation) -> int:
    c = sweep_file.apply_overrides(run.config, evaluation.overrides)
    timing = (
        _load_or_measure_timing(job, run)[job.definition.evaluations.index(evaluation.overrides)]
        if evaluation.kind == "seconds"
        else None
    )
    return budget.solver_steps(c, evaluation.kind, evaluation.asked, timing)


def _evaluate(job: Job, run: Run, base: ConfigDict) -> list[dict[str, Any]]:
    """A result of --mode=evaluate for each evaluation; several checkpoints are averaged."""
    found: dict[Any, dict[str, Any]] = {}
    keys = [(job.definition.evaluations.index(e.overrides), _solver_steps(job, run, e)) for e in job.evaluations]
    for i, overrides in enumerate(job.definition.evaluations):
        steps = sorted({steps for j, steps in keys if j == i})
        results = evaluate.run(_evaluation_config(base, overrides, steps), sweep_folder.run_folder(job.workdir, run))[
            "results"
        ]
        found |= zip(((i, n) for n in steps), judge.mean_over_checkpoints(results) or results, strict=True)
    return [found[key] for key in keys]


def _evaluation_config(c: ConfigDict, overrides: sweep_file.Overrides, steps: Sequence[int]) -> ConfigDict:
    """The config of one of a sweep's evaluations, at these numbers of solver steps."""
    c = sweep_file.apply_overrides(c, overrides)
    c.evaluate.grid = f"steps={','.join(map(str, steps))}"
    return c


def _run_result(
    job: Job, run: Run, lines: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], rows: list[int]
) -> Any:
    c = run.config
    curve = sweep_folder.loss_curve(lines, c.train.log_every)
    evaluations = []
    for evaluation, result in zip(job.evaluations, found, strict=True):
        cost = {name: value for name, value in result["cost"].items() if name != "seconds"}
        evaluations.append(
            evaluation.describe() | {"cost": cost, "scores": result["scores"], "protocol": result["protocol"]}
        )
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
        },
        "evaluations": evaluations,
        "grid": "grid.png" if rows else None,
        "grid_rows": rows,
        "versions": sweep_folder.package_versions(),
    }


def _phase_seconds(run: Run, lines: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "training": sweep_folder.training_seconds(lines),
        "evaluations": [result["cost"]["seconds"] for result in found],  # of an image
    }


def _remove_checkpoints(c: ConfigDict, folder: str) -> None:
    """All but those that are judged: more budgets may be asked for later."""
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        there = checkpoints.steps
    for step in set(there) - set(sampling_grid.select_checkpoints(c.evaluate.checkpoints, there)):
        (checkpoint.folder(folder) / str(step)).rmtree()


# ---- what runs share


def _make_once(workdir: str, name: str, path: str, make: Callable[[], Any]) -> None:
    """Calls `make`, which writes the file, in one process; the others wait for it."""
    while not _exists(path):
        try:
            with lock.acquire(sweep_folder.claim_path(workdir, name)):
                if not _exists(path):
                    make()
        except lock.LockedError:
            logging.info("waiting for %s, which another process makes", path)
            time.sleep(POLL_SECONDS)


def _exists(path: str) -> bool:
    found = jax.process_index() == 0 and epath.Path(path).exists()
    return bool(multihost_utils.broadcast_one_to_all(np.array(found))) if jax.process_count() > 1 else found


def _judge_config(c: ConfigDict, workdir: str, of_run: str) -> ConfigDict:
    """The config of a run in the folder `of_run`, with the paths of its judge.

    That is made here, a reader of attributes with it where there are captions, unless the config names a reference.

    Raises:
      ConfigError: it cannot be made, or the one that is named does not open.
    """
    c = c.copy_and_resolve_references()
    if c.evaluate.reference:
        sample_scores.open_judge(c, of_run, c.evaluate.n)
        return c
    name = sweep_file.judge_hash(c)
    folder = os.path.join(workdir, "judges", name)
    path, reads = judge_paths.reference_path(c, folder), judge_paths.attribute_classifier_path(c, folder)
    _make_once(workdir, f"judge_{name}", path, lambda: reference.run(c.copy_and_resolve_references(), folder))
    if prompts.uses_drawing_captions(c):  # a run without captions, which may have made the judge, needs none
        _make_once(workdir, f"judge_{name}", reads, lambda: reference.make_attribute_classifier(c, reads))
    c.evaluate.reference, c.evaluate.network_path = path, judge_paths.network_path(c, folder)
    return c


def _load_or_measure_timing(job: Job, run: Run, anew: bool = False) -> list[Timing]:
    """Of each of the sweep's evaluations at the run's point: measured, unless it was before and not `anew`."""
    name = job.first(run).name  # one measurement for all seeds of a point
    path = os.path.join(job.workdir, "timings", f"{name}.json")
    if anew and jax.process_index() == 0:
        epath.Path(path).unlink(missing_ok=True)
    _make_once(
        job.workdir,
        f"timing_{name}",  # that run itself claims the name alone
        path,
        lambda: storage.write_json(path, [_measure_timing(job, run, o) for o in job.definition.evaluations]),
    )
    found = storage.read_json(path)
    if jax.process_index() == 0:  # where a reader looks who knows of this run alone
        storage.write_json(
            os.path.join(sweep_folder.run_folder(job.workdir, run), "timing.json"), {"evaluations": found}
        )
    return [Timing(one["fixed"], one["per_step"]) for one in found]


def _measure_timing(job: Job, run: Run, overrides: sweep_file.Overrides) -> dict[str, Any]:
    c = sweep_file.apply_overrides(run.config, overrides)
    few, many = TIMED_STEPS
    figures = [benchmark.sampling(c) for c.sample.steps in TIMED_STEPS]
    seconds = [one["seconds_per_image"] for one in figures]
    per_step = (seconds[1] - seconds[0]) / (many - few)
    logging.info(
        "%s %s: %.3g s an image and %.3g s a step", run.point, dict(overrides), seconds[0] - few * per_step, per_step
    )
    return {
        "overrides": dict(overrides),
        "fixed": seconds[0] - few * per_step,
        "per_step": per_step,
        "batch": figures[0]["batch"],
    }


# ---- samples side by side


def _grid_steps(job: Job, found: Sequence[dict[str, Any]]) -> list[int]:
    """The evaluations of the first setting, cheapest first, each number of steps once."""
    cost: dict[int, int] = {}
    for i, (evaluation, result) in enumerate(zip(job.evaluations, found, strict=True)):
        if evaluation.overrides == job.definition.evaluations[0]:
            cost.setdefault(result["cost"]["solver_steps"], i)
    return [cost[steps] for steps in sorted(cost)]


def _write_sample_grid(job: Job, run: Run, steps: Sequence[int]) -> None:
    """Writes the first images, a row for each number of solver steps: by the programs of the evaluation, which are compiled."""
    c = sweep_file.apply_overrides(run.config, job.definition.evaluations[0])
    c.sample.n = c.evaluate.n
    folder = sweep_folder.run_folder(job.workdir, run)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, images_codec = madformer.build(c), codec.build(c)
    target = generation.abstract_params(model, mesh)
    with partitioning.scope(mesh), checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        step, params = checkpoints.restore_weights(c.sample.weights, target)
        config_lib.resolve_label_numbers(c, checkpoints.class_names(step))
        codec_params = jax.device_put(images_codec.load(), partitioning.replicated(mesh))
        rows = []
        for c.sample.steps in steps:
            draw = generation.make_sample_fn(c, model, images_codec.decode)
            batches = generation.batches(c, draw, params, codec_params, mesh, range(GRID_COLUMNS), most=c.sample.n)
            rows.append(np.concatenate([batch.images for batch in batches])[:GRID_COLUMNS])
    if jax.process_index() == 0:
        generation.write_png(os.path.join(folder, "grid.png"), generation.tile_rows(np.stack(rows)))
