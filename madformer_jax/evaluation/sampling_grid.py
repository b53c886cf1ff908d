"""What `evaluate.checkpoints` and `evaluate.grid` ask for: the checkpoints, and the settings at which each is drawn."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import validation
from madformer_jax.errors import ConfigError


def _parse_interval(text: str) -> tuple[int, ...]:
    low, high = text.split(":")
    return int(low), int(high)


# of `sample`: how a value is read, and what it looks like
FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "solver": (str, "str"),
    "spacing": (str, "str"),
    "steps": (int, "int"),
    "guidance": (float, "float"),
    "guidance_schedule": (str, "str"),
    "guidance_interval": (_parse_interval, "low:high"),
    "label_sampling": (str, "str"),
    "weights": (str, "str"),
    "prompts": (str, "str"),
}


def expand_configs(c: ConfigDict) -> list[ConfigDict]:
    """The config once for each combination of `evaluate.grid`, with `sample.n` = `evaluate.n`.

    The grid is as "steps=5,20;guidance=1,2": every combination of the values; "" is the config's own setting.

    Raises:
      ConfigError: a field is none of a sampling's, or a value is not of its type.
    """
    axes: list[list[tuple[str, Any]]] = []
    for part in filter(None, c.evaluate.grid.split(";")):
        name, _, values = part.partition("=")
        name = name.strip()
        if name not in FIELDS or not values:
            raise ConfigError(
                f"config.evaluate.grid: {part!r} is no setting: it is made of {', '.join(FIELDS)} with their values, "
                "as in steps=5,20;guidance=1,2."
            )
        read, kind = FIELDS[name]
        try:
            axes.append([(name, read(value.strip())) for value in values.split(",")])
        except ValueError:
            raise ConfigError(f"config.evaluate.grid: {part!r}: {name} takes {kind} values.") from None
    settings = []
    for combination in itertools.product(*axes):
        one = c.copy_and_resolve_references()
        one.sample.n = c.evaluate.n
        one.sample.update(dict(combination))
        settings.append(one)
    return settings


def log_warnings(c: ConfigDict, grid: Sequence[ConfigDict]) -> None:
    """Logs what is probably a mistake in the settings of a grid, each line once; main.py shows those of the config itself."""
    lines = dict.fromkeys(line for setting in grid for line in validation.sampling_warnings(setting))
    for line in lines:
        if line not in validation.sampling_warnings(c):
            logging.warning("%s", line)


def select_checkpoints(wanted: str, there: Sequence[int]) -> list[int]:
    """The checkpoints that `evaluate.checkpoints` names among those that are there.

    Args:
      wanted: "newest", "last:5", or steps, as in "1000,2000".
      there: all complete steps.

    Raises:
      ConfigError: a step is not there, or the text is none of these.
    """
    known = sorted(there)
    kind, _, count = wanted.partition(":")
    try:
        if kind == "last" or wanted == "newest":
            number = int(count or 1)
            if not 1 <= number <= len(known):
                raise ConfigError(f"config.evaluate.checkpoints={wanted!r}: there are {len(known)}: {known}.")
            return known[-number:]
        chosen = [int(step) for step in wanted.split(",")]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"config.evaluate.checkpoints={wanted!r} must be 'newest', 'last:5' or steps, as in '1000,2000'."
        ) from None
    if missing := [step for step in chosen if step not in known]:
        raise ConfigError(f"config.evaluate.checkpoints: there is no step {missing[0]}, only {known}.")
    return chosen
