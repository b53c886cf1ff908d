"""Solver steps of each block, from `sample.steps_by_block`.

Later blocks have more context and may need fewer steps (DiSA, arXiv 2505.20297). `validation` checks
the values. The sampler, the costs and the interfaces call `steps_of_blocks`.
"""

import math
import re

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError

CONSTANT = "constant"
_ENTRY = re.compile(r"(\d{1,6})|(\d{1,6}(?:\.\d{1,6})?)x")


def steps_of_blocks(c: ConfigDict) -> tuple[int, ...]:
    """Returns the solver steps of each block, in the order in which blocks are drawn.

    Raises:
      ConfigError: See `parse`.
    """
    return parse(c.sample.steps_by_block, c.model.blocks, c.sample.steps)


def parse(text: str, blocks: int, steps: int) -> tuple[int, ...]:
    """Returns the solver steps of each block.

    Args:
      text: "constant", "linear:a:b" from the first to the last block, or an entry for each block with
        commas or slashes between them. An entry is a number of steps such as "8", or a multiple of `steps`
        such as "0.5x".
      blocks: L, the number of blocks.
      steps: The value of `sample.steps`.

    Raises:
      ConfigError: The text has another form, or has a wrong number of entries.
    """
    if text == CONSTANT:
        return (steps,) * blocks
    kind, _, bounds = text.partition(":")
    if kind == "linear":
        entries = bounds.split(":")
        values = [_parse_entry(text, entry, blocks, steps) for entry in entries]
        if len(values) != 2:
            raise _error(text, blocks)
        first, last = values
        return tuple(_round(first + (last - first) * i / max(1, blocks - 1)) for i in range(blocks))
    values = [_parse_entry(text, entry, blocks, steps) for entry in re.split("[,/]", text)]
    if len(values) != blocks:
        raise ConfigError(
            f"config.sample.steps_by_block={text!r} has {len(values)} entries: give one for each of the {blocks} blocks."
        )
    return tuple(map(_round, values))


def depends_on_steps(text: str) -> bool:
    """Returns whether `sample.steps` changes the steps of a block."""
    return text == CONSTANT or "x" in text


def _parse_entry(text: str, entry: str, blocks: int, steps: int) -> float:
    match = _ENTRY.fullmatch(entry.strip())
    if match is None or (match[1] and not int(match[1])):
        raise _error(text, blocks)
    return float(match[1]) if match[1] else float(match[2]) * steps


def _round(value: float) -> int:
    """Rounds to the nearest number of steps, halves up. The result is at least 1."""
    return max(1, math.floor(value + 0.5))


def _error(text: str, blocks: int) -> ConfigError:
    return ConfigError(
        f"config.sample.steps_by_block={text!r} must be 'constant', 'linear:16:4' (first and last block), or an entry for "
        f"each of the {blocks} blocks, as in '16,8,8,4'. An entry is a number of steps from 1, or a multiple of "
        "config.sample.steps, as in '0.5x'."
    )
