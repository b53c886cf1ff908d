"""Parsing of `evaluate.checkpoints` and `evaluate.grid`: which checkpoints and settings to sample.

`modes.evaluate`, `modes.gallery` and `modes.sweep` use it. A sampling field that the grid can vary
needs an entry in `FIELDS`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import validation
from madformer_jax.errors import ConfigError
from madformer_jax.sampling import solving


def _parse_interval(text: str) -> tuple[int, ...]:
    low, high = text.split(":")
    return int(low), int(high)


# Fields of `sample` that a grid can vary: parser and description of a value.
FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "solver": (str, "str"),
    "spacing": (str, "str"),
    "steps": (int, "int"),
    "steps_by_block": (str, "str"),
    "diffusion_depth": (int, "int"),
    "context_noise": (int, "int"),
    "guidance": (float, "float"),
    "guidance_schedule": (str, "str"),
    "guidance_interval": (_parse_interval, "low:high"),
    "label_sampling": (str, "str"),
    "weights": (str, "str"),
    "ema": (float, "float"),
    "prompts": (str, "str"),
    "block_order": (str, "str"),
}


def expand_configs(c: ConfigDict, field: str = "evaluate.grid") -> list[ConfigDict]:
    """Returns a copy of the config for each combination of `evaluate.grid`.

    The copies have `sample.n` = `evaluate.n`, unless that is 0. "steps=5,20;guidance=1,2" is a grid of four
    combinations. "" is the config's own setting. Messages name `field`, from which the grid comes.

    Raises:
      ConfigError: A field is not in `FIELDS` or occurs twice, or a value has the wrong type.
    """
    axes: list[list[tuple[str, Any]]] = []
    for axis in filter(None, c.evaluate.grid.split(";")):
        name, _, values = axis.partition("=")
        name = name.strip()
        if name not in FIELDS or not values:
            raise ConfigError(
                f"config.{field}: {axis!r} is not a setting: use {', '.join(FIELDS)} with values, "
                "as in steps=5,20;guidance=1,2."
            )
        if name in (known for known, _ in itertools.chain(*axes)):
            raise ConfigError(
                f"config.{field}={c.evaluate.grid!r} names {name} twice: write all its values in one list."
            )
        parse, kind = FIELDS[name]
        try:
            axes.append([(name, parse(value.strip())) for value in values.split(",")])
        except ValueError:
            raise ConfigError(f"config.{field}: {axis!r}: {name} takes {kind} values.") from None
    settings = []
    for combination in itertools.product(*axes):
        setting = c.copy_and_resolve_references()
        setting.sample.n = c.evaluate.n or c.sample.n
        setting.sample.update(dict(combination))
        settings.append(setting)
    return settings


def program_key(setting: ConfigDict, grid: Sequence[ConfigDict]) -> tuple[tuple[Any, ...], int]:
    """Returns the sampling settings that a program is compiled for, and the size of its coefficients.

    Settings of a grid that differ in the steps, the spacing or the noise path share a program whose
    coefficients are arguments (`solving.pad_steps`). A setting that shares with no other has its own
    program, and the size is 0: a fixed number of steps is faster on some devices.
    """

    def static_settings(c: ConfigDict) -> tuple[Any, ...]:  # see also `sweeps.programs`
        s, steps = c.sample, solving.solver_steps(c)
        by_block = None if isinstance(steps, int) else (s.spacing, steps)  # compiled into the program
        return s.solver, s.guidance == 1.0, s.diffusion_depth, s.context_noise, s.block_order, by_block

    key = static_settings(setting)
    group = [other for other in grid if static_settings(other) == key]
    if key[-1] or len({(other.sample.spacing, other.sample.steps) for other in group}) == 1:
        return (*key, setting.sample.spacing, setting.sample.steps), 0
    size = solving.padded_size(max(map(solving.evaluations, group)))
    return (*key, size), size


def log_warnings(c: ConfigDict, grid: Sequence[ConfigDict]) -> None:
    """Logs probable mistakes in the settings of a grid, each once.

    The command line already logs the warnings of the config itself.
    """
    lines = dict.fromkeys(line for setting in grid for line in validation.sampling_warnings(setting))
    for line in lines:
        if line not in validation.sampling_warnings(c):
            logging.warning("%s", line)


def select_checkpoints(selection: str, available: Sequence[int]) -> list[int]:
    """Returns the steps of the checkpoints that `evaluate.checkpoints` selects, each once.

    Args:
      selection: "newest", "last:5", or steps, as in "1000,2000".
      available: Steps of all complete checkpoints.

    Raises:
      ConfigError: A checkpoint does not exist, or the selection has another form.
    """
    steps = sorted(available)
    kind, _, count = selection.partition(":")
    try:
        if kind == "last" or selection == "newest":
            number = int(count or 1)
            if not 1 <= number <= len(steps):
                raise ConfigError(f"config.evaluate.checkpoints={selection!r}: there are {len(steps)}: {steps}.")
            return steps[-number:]
        selected = list(dict.fromkeys(int(step) for step in selection.split(",")))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"config.evaluate.checkpoints={selection!r} must be 'newest', 'last:5' or steps, as in '1000,2000'."
        ) from None
    if missing := [step for step in selected if step not in steps]:
        raise ConfigError(f"config.evaluate.checkpoints: there is no step {missing[0]}, only {steps}.")
    return selected
