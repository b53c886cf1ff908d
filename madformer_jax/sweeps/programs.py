"""Numbers of programs that a sweep compiles for training and for sampling.

Runs whose settings differ only in what is an argument of a program share it through the compilation
cache (docs/performance.md): seeds, data, and numbers of solver steps. `run_table` prints the numbers.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import fields, identity
from madformer_jax.sweeps import budget, sweep_file
from madformer_jax.sweeps.sweep_file import Overrides
from madformer_jax.sweeps.sweep_folder import Job

_SHAPES = ("data.image_size", "data.channels")
_TRAINING = ("model", "text", "loss", "diffusion", "codec", "train", "optimizer")
_SAMPLING = ("model", "text", "codec")
# These decide what the programs get as arguments.
_ARGUMENTS = ("train.init_from", "codec.path", "text.caption", "text.tokenizer")


def count(job: Job) -> tuple[int, int]:
    """Returns the number of training programs and the number of sampling programs of all runs.

    Budgets in seconds count as one number of solver steps, which is unknown before it is measured.
    """
    sampling = set()
    for run in job.runs:
        for overrides in job.definition.evaluations:
            c = sweep_file.apply_overrides(run.config, overrides)
            sampling.add(sampling_program(c, steps(job, c, overrides)))
    return len({training_program(run.config) for run in job.runs}), len(sampling)


def training_program(c: ConfigDict) -> tuple[Any, ...]:
    """Returns the settings that the training program of a run is compiled for."""
    return _settings(c, _TRAINING)


def sampling_program(c: ConfigDict, solver_steps: Iterable[int]) -> tuple[Any, ...]:
    """Returns the settings that the sampling program of an evaluation is compiled for.

    Args:
      c: The config of the evaluation.
      solver_steps: All numbers of solver steps of the evaluation. With several, steps, spacing and
        noise path are arguments (`sampling.solving.pad_steps`).
    """
    s, steps = c.sample, set(solver_steps)
    static = () if len(steps) > 1 else (s.spacing, *steps, *_settings(c, ("diffusion",)))
    return *_settings(c, _SAMPLING), s.solver, s.clip_x0, s.guide, s.guidance == 1.0, s.batch, static


def steps(job: Job, c: ConfigDict, overrides: Overrides) -> set[int]:
    """Returns the numbers of solver steps of the evaluations with these overrides, without those in seconds."""
    evaluations = [e for e in job.evaluations if e.overrides == overrides and e.kind != "seconds"]
    return {budget.solver_steps(c, e.kind, e.amount) for e in evaluations}


def _settings(c: ConfigDict, sections: Iterable[str]) -> tuple[Any, ...]:
    return tuple(
        (name, value)
        for name, value in fields.flat(c).items()
        if name in _SHAPES or name.partition(".")[0] in sections
        if identity.affects_results(name) and name not in _ARGUMENTS
    )
