"""The files result.json and seconds.json of a finished run.

`modes.sweep` writes them. `sweep_folder` lists the files of a sweep, and `reports.results` reads them.
"""

from collections.abc import Sequence
from typing import Any

from madformer_jax.sweeps import budget, sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import Run
from madformer_jax.sweeps.sweep_folder import Job


def run_result(
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


def phase_seconds(lines: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns seconds.json of a run: seconds of the training, and of an image in each evaluation."""
    return {
        "training": sweep_folder.training_seconds(lines),
        "evaluations": [result["cost"]["seconds"] for result in results],
    }


def grid_rows(job: Job, results: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the indices of the evaluations that are rows of the sample grid.

    They are those with the first overrides, one for each number of solver steps, cheapest first.
    """
    index: dict[int, int] = {}  # solver steps -> evaluation
    for i, (evaluation, result) in enumerate(zip(job.evaluations, results, strict=True)):
        if evaluation.overrides == job.definition.evaluations[0]:
            index.setdefault(result["cost"]["solver_steps"], i)
    return [index[steps] for steps in sorted(index)]
