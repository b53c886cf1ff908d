"""The table that `--mode=sweep --dry_run` prints: the runs of a sweep with their cost and status."""

import os
import statistics
from collections.abc import Iterator

import jax

from madformer_jax.cost import flops
from madformer_jax.runtime import storage
from madformer_jax.sweeps import budget, programs, sweep_file, sweep_folder
from madformer_jax.sweeps import protocol as protocol_lib
from madformer_jax.sweeps.sweep_file import Run
from madformer_jax.sweeps.sweep_folder import Job

ASSUMED_UTILIZATION = 0.5  # share of the peak rate, assumed while no run of the sweep is finished


def run_table(job: Job) -> str:
    """Formats the protocol, the runs, their cost, their status and the estimated hours of those that remain."""
    training_rate, sampling_rate, source = _flop_rates(job)
    lines, remaining = [("run", "overrides", "steps", "training PFLOP", "sampling PFLOP", "minutes", "state")], 0.0
    for run in job.runs:
        training = budget.training_flops(run.config)
        sampling = run.config.evaluate.n * sum(_sampling_flops(job, run))
        minutes = (training / training_rate + sampling / sampling_rate) / 60
        status = sweep_folder.run_status(job.workdir, run, job.evaluations)
        remaining += 0 if status == "done" else minutes
        overrides = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in run.overrides.items())
        costs = f"{training / 1e15:.4g}", f"{sampling / 1e15:.4g}", f"{minutes:.3g}"
        lines.append((run.name, overrides, str(run.config.train.steps), *costs, status))
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    rows.append("programs to compile: {} of training and {} of sampling.".format(*programs.count(job)))
    rows.append(
        f"{len(job.runs)} runs; those that are not done take one process about {remaining / 60:.3g} h, at "
        f"{training_rate / 1e9:.4g} GFLOP/s in training and {sampling_rate / 1e9:.4g} in sampling ({source}). Compilation, "
        "held-out scores and the training of a judge come on top."
    )
    if protocol := job.definition.protocol:
        seeds = len({run.config.seed for run in job.runs})
        facts = protocol_lib.facts(protocol.describe(), job.definition.question, seeds)
        rows = [*(f"{name}: {value}" for name, value in facts), "", *rows]
    return "\n".join(rows)


def _sampling_flops(job: Job, run: Run) -> Iterator[float]:
    """Yields the FLOPs of an image for each distinct evaluation of a run.

    Budgets in seconds are left out: their steps are unknown before the seconds are measured.
    """
    for overrides in job.definition.evaluations:
        c = sweep_file.apply_overrides(run.config, overrides)
        for steps in programs.steps(job, c, overrides):
            yield budget.sampling_cost(c, "flops", steps)


def _flop_rates(job: Job) -> tuple[float, float, str]:
    """Returns the FLOP/s of training and of sampling, and a description of their source."""
    training, sampling = [], []
    for run in job.runs:
        folder = sweep_folder.run_folder(job.workdir, run)
        seconds = storage.read_json_object(os.path.join(folder, "seconds.json"), "training", "evaluations")
        result = sweep_folder.read_result(os.path.join(folder, "result.json"))
        if seconds and result and seconds["training"]:  # 0 if only the step that compiled was run
            training.append(result["training"]["flops"] / seconds["training"])
            sampling += [e["cost"]["flops"] / s for e, s in zip(result["evaluations"], seconds["evaluations"])]
    if training:
        return statistics.median(training), statistics.median(sampling), f"medians of {len(training)} finished runs"
    rate = ASSUMED_UTILIZATION * jax.device_count() * flops.peak_rate(job.runs[0].config.model.dtype)
    return rate, rate, f"assumed: {ASSUMED_UTILIZATION:.0%} of the peak"
