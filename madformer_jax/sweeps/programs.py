"""Numbers of programs that a sweep compiles for training and for sampling.

Runs whose settings differ only in what is an argument of a program share it through the compilation
cache (docs/performance.md): seeds, data, and numbers of solver steps. `run_table` prints the numbers.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import block_steps, elastic_depth, fields, identity
from madformer_jax.sweeps import budget, sweep_file
from madformer_jax.sweeps.sweep_file import Overrides
from madformer_jax.sweeps.sweep_folder import Job

_SHAPES = ("data.image_size", "data.channels")
_TRAINING = ("model", "text", "loss", "diffusion", "codec", "train", "optimizer")
_SAMPLING = ("model", "text", "codec")
# Fields of `sample` that are compiled into a program, as in `sampling_grid.program_key`.
_STATIC_FIELDS = ("solver", "clip_x0", "guide", "batch", "diffusion_depth", "context_noise", "block_order")
# These decide what the programs get as arguments.
_ARGUMENTS = ("train.init_from", "codec.path", "text.caption", "text.tokenizer")


def count(job: Job) -> tuple[int, int]:
    """Returns the number of training programs and the number of sampling programs of all runs.

    Budgets in seconds count as one number of solver steps, which is unknown before it is measured.
    """
    sampling: set[tuple[Any, ...]] = set()
    for run in job.runs:
        for overrides in job.definition.evaluations:
            c = sweep_file.apply_overrides(run.config, overrides)
            sampling |= sampling_programs(c, steps(job, c, overrides))
    # Each D of an elastic training has a program of its own.
    training = {training_program(run.config): len(elastic_depth.trained_depths(run.config)) for run in job.runs}
    return sum(training.values()), len(sampling)


def training_program(c: ConfigDict) -> tuple[Any, ...]:
    """Returns the settings that the training program of a run is compiled for."""
    return _settings(c, _TRAINING)


def sampling_programs(c: ConfigDict, solver_steps: Iterable[int]) -> set[tuple[Any, ...]]:
    """Returns the settings that each sampling program of an evaluation is compiled for.

    Args:
      solver_steps: All numbers of solver steps of the evaluation. With several, one program serves all: steps, spacing
        and noise path are arguments (`sampling.solving.pad_steps`). If the blocks of an image differ in steps, each
        number has a program of its own.
    """
    s = c.sample
    shared = *_settings(c, _SAMPLING), *(s[name] for name in _STATIC_FIELDS), s.guidance == 1.0
    path = s.spacing, *_settings(c, ("diffusion",))
    of_blocks = {block_steps.parse(s.steps_by_block, c.model.blocks, n) for n in solver_steps}
    equal = {steps for steps in of_blocks if len(set(steps)) == 1}
    programs = {(*shared, steps, path) for steps in of_blocks - equal}
    if equal or not of_blocks:
        programs.add((*shared, *(() if len(equal) > 1 else (*equal, path))))
    return programs


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
