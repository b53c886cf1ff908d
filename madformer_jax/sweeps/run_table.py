"""The list of a sweep's runs, with what they cost."""

import os
import statistics
from collections.abc import Iterator

import jax

from madformer_jax.cost import flops
from madformer_jax.runtime import storage
from madformer_jax.sweeps import budget, sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import Run
from madformer_jax.sweeps.sweep_folder import Job

ASSUMED_UTILIZATION = 0.5  # share of the peak rate that is assumed where no run of the sweep has been measured


def run_table(job: Job) -> str:
    """The runs, what they cost, and the minutes that those which are not done may take."""
    training_rate, sampling_rate, source = _flop_rates(job)
    lines, minutes = [("run", "overrides", "steps", "training PFLOP", "sampling PFLOP", "minutes", "state")], 0.0
    for run in job.runs:
        training = budget.training_flops(run.config)
        sampling = run.config.evaluate.n * sum(_sampling_flops(job, run))
        takes = (training / training_rate + sampling / sampling_rate) / 60
        state = sweep_folder.run_status(job.workdir, run, job.evaluations)
        minutes += 0 if state == "done" else takes
        overrides = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in run.overrides.items())
        costs = f"{training / 1e15:.4g}", f"{sampling / 1e15:.4g}", f"{takes:.3g}"
        lines.append((run.name, overrides, str(run.config.train.steps), *costs, state))
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    rows.append(
        f"{len(job.runs)} runs, about {minutes / 60:.3g} h of one process for those that are not done, compiling left out, at "
        f"{training_rate / 1e9:.4g} GFLOP/s in training and {sampling_rate / 1e9:.4g} in sampling ({source})."
    )
    return "\n".join(rows)


def _sampling_flops(job: Job, run: Run) -> Iterator[float]:
    """Of an image of each evaluation, equal ones once; budgets of seconds are not known before they are measured."""
    for overrides in job.definition.evaluations:
        c = sweep_file.apply_overrides(run.config, overrides)
        mine = [e for e in job.evaluations if e.overrides == overrides and e.kind != "seconds"]
        for steps in {budget.solver_steps(c, e.kind, e.asked) for e in mine}:
            yield budget.sampling_cost(c, "flops", steps)


def _flop_rates(job: Job) -> tuple[float, float, str]:
    """FLOP/s of training and of sampling, and where they are from."""
    training, sampling = [], []
    for run in job.runs:
        folder = sweep_folder.run_folder(job.workdir, run)
        told, result = (storage.read_json(os.path.join(folder, f"{name}.json")) for name in ("seconds", "result"))
        if told and result:
            training.append(result["training"]["flops"] / told["training"])
            sampling += [e["cost"]["flops"] / s for e, s in zip(result["evaluations"], told["evaluations"])]
    if training:
        return (
            statistics.median(training),
            statistics.median(sampling),
            f"medians of {len(training)} runs that are done",
        )
    rate = ASSUMED_UTILIZATION * jax.device_count() * flops.peak_rate(job.runs[0].config.model.dtype)
    return rate, rate, f"assumed: {ASSUMED_UTILIZATION:.0%} of the peak"
