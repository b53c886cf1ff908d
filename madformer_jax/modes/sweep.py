"""--mode=sweep: trains and evaluates every run of a sweep once.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/depth.py:digits --workdir=DIR

--dry_run only lists the runs. --measure only measures the seconds of sampling. --processes sets the
processes on this machine, by default one for each core of a CPU (`sweeps.processes`).

Any number of processes share DIR: each takes the next run that no other process has claimed
(`sweeps.sweep_folder` lists the files). After a kill, the same command resumes: a training from its
checkpoint, an evaluation from its finished shards. `--mode=report` reads the results.
"""

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import fields
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import held_out_scores, judge, judge_paths, sampling_grid, score_summary
from madformer_jax.modes import benchmark, evaluate, reference, train
from madformer_jax.runtime import checkpoint, console, lock, malloc, partitioning, storage
from madformer_jax.sampling import generation, prompts, solving
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.sweeps import budget, claim_check, programs, run_result, run_table, sweep_file, sweep_folder
from madformer_jax.sweeps import processes as processes_lib
from madformer_jax.sweeps.budget import Timing
from madformer_jax.sweeps.shared_work import POLL_SECONDS, broadcast, make_once
from madformer_jax.sweeps.sweep_file import Evaluation, Run
from madformer_jax.sweeps.sweep_folder import Job
from madformer_jax.training import lanes

GRID_COLUMNS = 8  # images in a row of a run's sample grid
MAX_LANES = 8  # runs that train in one program with `train.lanes=0`
TIMED_STEPS = (4, 16)  # solver steps that are timed; other numbers follow by a straight line

_slow_lanes: set[str] = set()  # workdirs of sweeps in which this process has measured that lanes are slower


def run(
    c: ConfigDict,
    workdir: str,
    *,
    file: sweep_file.ConfigFile,
    dry_run: bool = False,
    measure: bool = False,
    processes: str = "1",
    argv: Sequence[str] = (),
) -> dict[str, Any]:
    """Completes all runs of a sweep and waits for those that other processes work on.

    Args:
      c: The base config: the result of the file's get_config with the changes of the command line.
      workdir: The sweep's folder.
      file: The executed sweep file.
      dry_run: If True, only prints a table of the runs.
      measure: If True, only measures the seconds of sampling an image for every combination of
        settings. The machine should be idle.
      processes: Number of processes that share the runs on this machine, or "auto" (`processes_lib`).
      argv: The arguments of this command, which further processes get.

    Returns:
      The names of the runs under "runs", or the name of a run that was asked to stop under "stopped": the
      first unfinished one if there are several processes. {} with `dry_run` or `measure`.

    Raises:
      ConfigError: The sweep is wrong, and nothing was done. Or some runs failed, and all others are
        done.
    """
    processes_lib.end_with_parent()
    definition = sweep_file.load_sweep(file)
    name = os.path.splitext(os.path.basename(str(file.module.__file__)))[0]
    runs = sweep_folder.reuse_folder_names(sweep_file.expand_runs(definition, c), workdir)
    evaluations = sweep_file.expand_evaluations(definition)
    claim_check.check(definition, c)
    swept = {field for run in runs for field in run.overrides_without_seed}
    base = {field: value for field, value in fields.flat(c).items() if field in swept}
    job = Job(name, "".join(file.args), definition, runs, evaluations, workdir, base)
    for run, overrides in itertools.product(job.runs, definition.evaluations):
        sampled = sweep_file.apply_overrides(run.config, overrides)
        budget.check_steps_vary(sampled)
        steps = programs.steps(job, sampled, overrides) or {run.config.sample.steps}  # seconds are measured later
        evaluate.check(_evaluation_config(run.config, overrides, sorted({min(steps), max(steps)})))
    storage.check_arrays_path(workdir, write=True)
    if dry_run:
        console.print_text(run_table.run_table(job))
        return {}
    claim_check.check_unchanged(job)
    if jax.process_index() == 0:
        with storage.wrap_errors(f"--workdir={workdir} cannot be written"):
            storage.write_json(os.path.join(workdir, "sweep.json"), sweep_folder.plan_json(job))
    if measure:
        for run in job.runs:
            _load_or_measure_timing(job, run, force=run is job.first_seed_run(run))
        return {}
    remaining = [run for run in job.runs if not _is_done(job, run)]
    by_data = {sweep_file.judge_hash(run.config): run for run in reversed(remaining)}
    for run in by_data.values():
        held_out_scores.open_images(_held_out_config(job, run.config))
    count = processes_lib.choose_count(processes, len(remaining), jax.default_backend(), jax.process_count())
    return _run_all(job) if count == 1 else _run_processes(job, remaining, argv, count)


def _run_processes(job: Job, runs: list[Run], argv: Sequence[str], count: int) -> dict[str, Any]:
    """Completes all runs with several processes.

    Makes what the runs share before: judges with all cores, and timings while the machine is idle.
    """
    for run in runs:
        _judge_config(run.config, job.workdir, sweep_folder.run_folder(job.workdir, run))
        if any(evaluation.kind == "seconds" for evaluation in job.evaluations):
            _load_or_measure_timing(job, run)
    _free_memory()
    command = processes_lib.single_process_command(argv)
    finished = processes_lib.run(command, job.workdir, count, len(job.runs), lambda: sweep_folder.progress(job))
    return {"runs": [run.name for run in job.runs]} if finished else {"stopped": runs[0].name}


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
    first = processes_lib.index() % len(runs)
    return runs[first:] + runs[:first]


def _is_done(job: Job, run: Run) -> bool:
    """Returns whether a run is done; all JAX processes get the answer of the first."""
    return broadcast(jax.process_index() == 0 and sweep_folder.is_done(job.workdir, run, job.evaluations))


def _free_memory() -> None:
    """Frees the memory of the previous run."""
    jax.clear_caches()
    gc.collect()
    malloc.trim()


# ---- one run


def _do_run(job: Job, run: Run) -> bool:
    """Trains and evaluates a run and writes its result. Returns False if the training was asked to stop."""
    folder = sweep_folder.run_folder(job.workdir, run)
    base = _judge_config(run.config, job.workdir, folder)  # before the training, so that errors come early
    held_out_scores.open_images(_held_out_config(job, base))
    if not broadcast(_is_trained(run.config, folder)):
        if not _train(job, run):
            return False
        _free_memory()
    evaluations, held_out = _evaluate(job, run, base)
    rows = run_result.grid_rows(job, evaluations) if run is job.first_seed_run(run) else []
    if rows:
        _write_sample_grid(job, run, [evaluations[i]["cost"]["solver_steps"] for i in rows])
    if jax.process_index():
        return True
    lines = sweep_folder.metric_lines(folder)
    storage.write_json(os.path.join(folder, "seconds.json"), run_result.phase_seconds(lines, evaluations))
    result = run_result.run_result(job, run, lines, evaluations, rows) | held_out
    storage.write_json(os.path.join(folder, "result.json"), result)
    _remove_checkpoints(run.config, folder)
    return True


def _held_out_config(job: Job, c: ConfigDict) -> ConfigDict:
    """Returns the config of a run with the settings of its held-out scores, those of the first evaluation."""
    return sweep_file.apply_overrides(c, job.definition.evaluations[0])


def _train(job: Job, run: Run) -> bool:
    """Trains a run, and others in the same program if `train.lanes` says so; False if asked to stop."""
    with contextlib.ExitStack() as claims:
        group = [run, *_claim_lanes(job, run, claims)]
        configs = [other.config.copy_and_resolve_references() for other in group]
        folders = [sweep_folder.run_folder(job.workdir, other) for other in group]
        results = train.run_lanes(configs, folders) if len(group) > 1 else None
        if len(group) > 1 and results is None:
            _slow_lanes.add(job.workdir)
        result = train.run(configs[0], folders[0], grids=False) if results is None else results[0]
    if isinstance(result, ConfigError):
        raise result
    return "stopped" not in result


def _claim_lanes(job: Job, run: Run, claims: contextlib.ExitStack) -> list[Run]:
    """Claims the runs that train in one program with a run; they are evaluated when their turn comes."""
    c, most = run.config, run.config.train.lanes
    if most == 0:  # on a CPU, lanes are never faster (docs/engineering_log.md)
        most = 1 if jax.default_backend() == "cpu" or job.workdir in _slow_lanes else MAX_LANES
    key, step = lanes.group_key(c), _newest_step(job, run)
    if most == 1 or jax.device_count() > 1 or c.profile or c.train.elastic_depth or step == [c.train.steps]:
        return []
    group: list[Run] = []
    for other in job.runs:
        if len(group) + 1 < most and other is not run and lanes.group_key(other.config) == key:
            with contextlib.suppress(lock.LockedError), contextlib.ExitStack() as claim:
                claim.enter_context(lock.acquire(sweep_folder.claim_path(job.workdir, other.name)))
                if _newest_step(job, other) == step and not _is_done(job, other):
                    group.append(other)
                    claims.enter_context(claim.pop_all())  # else other processes may claim it
    return group


def _newest_step(job: Job, run: Run) -> list[int]:
    return checkpoint.complete_steps(sweep_folder.run_folder(job.workdir, run))[-1:]


def _is_trained(c: ConfigDict, folder: str) -> bool:
    """Returns whether a run has its last checkpoint, and the validation that comes after it."""
    steps = c.train.steps
    return checkpoint.complete_steps(folder)[-1:] == [steps] and (
        not c.train.validate_every
        or any(line["step"] == steps and "validated" in line for line in sweep_folder.metric_lines(folder))
    )


def _solver_steps(job: Job, run: Run, evaluation: Evaluation) -> int:
    c = sweep_file.apply_overrides(run.config, evaluation.overrides)
    timing = None
    if evaluation.kind == "seconds":
        timing = _load_or_measure_timing(job, run)[job.definition.evaluations.index(evaluation.overrides)]
    return budget.solver_steps(c, evaluation.kind, evaluation.amount, timing)


def _evaluate(job: Job, run: Run, base: ConfigDict) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a result of --mode=evaluate for each evaluation, and held-out scores; means over checkpoints."""
    held_out: dict[str, Any] = {}
    by_settings: dict[Any, dict[str, Any]] = {}  # (index of the overrides, solver steps) -> result
    keys = [(job.definition.evaluations.index(e.overrides), _solver_steps(job, run, e)) for e in job.evaluations]
    for i, overrides in enumerate(job.definition.evaluations):
        steps = sorted({steps for j, steps in keys if j == i})
        folder = sweep_folder.run_folder(job.workdir, run)
        c = _evaluation_config(base, overrides, steps)
        if i:  # held-out scores are those of the first overrides
            c.evaluate.held_out_n, c.evaluate.by_block = 0, False
        outcome = evaluate.run(c, folder)
        results = outcome["results"]
        if "held_out" in outcome:
            held_out = held_out_scores.run_entries(outcome["held_out"])
        means = score_summary.mean_over_checkpoints(results) or results
        by_settings |= zip(((i, n) for n in steps), means, strict=True)
    return [by_settings[key] for key in keys], held_out


def _evaluation_config(c: ConfigDict, overrides: sweep_file.Overrides, steps: Sequence[int]) -> ConfigDict:
    """Returns the config that evaluates a run with these overrides at these numbers of solver steps."""
    c = sweep_file.apply_overrides(c, overrides)
    c.evaluate.grid = f"steps={','.join(map(str, steps))}"
    return c


def _remove_checkpoints(c: ConfigDict, folder: str) -> None:
    """Removes the checkpoints that no evaluation needs.

    The others stay, since a later command may add budgets. Snapshots of averages stay, too.
    """
    steps = checkpoint.complete_steps(folder)
    snapshots = {step for step in steps if c.train.ema_snapshots and step % c.train.ema_snapshots == 0}
    for step in set(steps) - set(sampling_grid.select_checkpoints(c.evaluate.checkpoints, steps)) - snapshots:
        (checkpoint.folder(folder) / str(step)).rmtree()


# ---- judges and timings, which runs share


def _judge_config(c: ConfigDict, workdir: str, folder: str) -> ConfigDict:
    """Returns the config of a run with the paths of its judge.

    Makes the judge in `workdir`, the sweep's folder, if the config does not name a reference. A model
    whose captions name attributes gets an attribute classifier, too.
    """
    c = c.copy_and_resolve_references()
    if c.evaluate.reference:
        judge.open_judge(c, folder, c.evaluate.n)
        return c
    name = sweep_file.judge_hash(c)
    judge_folder = os.path.join(workdir, "judges", name)
    path = judge_paths.reference_path(c, judge_folder)
    make_once(workdir, f"judge_{name}", path, lambda: reference.run(c.copy_and_resolve_references(), judge_folder))
    # Not part of the judge above: a run without captions may have made that one.
    if prompts.names_attributes(c):
        classifier = judge_paths.attribute_classifier_path(c, judge_folder)
        make_once(workdir, f"judge_{name}", classifier, lambda: reference.make_attribute_classifier(c, classifier))
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
    make_once(
        job.workdir,
        f"timing_{name}",  # `name` alone is the claim of the run
        path,
        lambda: storage.write_json(path, [_measure_timing(run, o) for o in job.definition.evaluations]),
    )
    timings = storage.read_json(path)
    if jax.process_index() == 0:  # a copy in the run's folder, which makes that folder complete
        copy = os.path.join(sweep_folder.run_folder(job.workdir, run), "timing.json")
        storage.write_json(copy, {"evaluations": timings})
    return [Timing(timing["fixed"], timing["per_step"]) for timing in timings]


def _measure_timing(run: Run, overrides: sweep_file.Overrides) -> dict[str, Any]:
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


def _write_sample_grid(job: Job, run: Run, steps: Sequence[int]) -> None:
    """Writes the first images to grid.png, a row for each number of solver steps.

    Batch size and steps are those of the evaluation, whose compiled program is used again.
    """
    c = sweep_file.apply_overrides(run.config, job.definition.evaluations[0])
    folder = sweep_folder.run_folder(job.workdir, run)
    trained = TrainedModel.open(c, folder, step=-1)
    config_lib.resolve_label_numbers(c, trained.class_names)
    with partitioning.scope(trained.mesh):
        codec_params, rows = trained.load_codec_params(), []
        network, params = trained.sampled(c)
        grid = sampling_grid.expand_configs(_evaluation_config(c, {}, steps))
        programs_by_key: dict[Any, generation.SampleFn] = {}
        for setting in grid:
            key, size = sampling_grid.program_key(setting, grid)
            if key not in programs_by_key:
                programs_by_key[key] = generation.make_sample_fn(setting, network, trained.codec.decode)
            sample_fn = solving.pad_steps(programs_by_key[key], setting, size) if size else programs_by_key[key]
            batches = generation.batches(
                setting, sample_fn, params, codec_params, trained.mesh, range(GRID_COLUMNS), max_batch=c.evaluate.n
            )
            rows.append(np.concatenate([batch.images for batch in batches])[:GRID_COLUMNS])
    if jax.process_index() == 0:
        generation.write_png(os.path.join(folder, "grid.png"), generation.tile_rows(np.stack(rows)))
