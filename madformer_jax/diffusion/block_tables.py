"""Solver coefficients of blocks that differ in their number of solver steps.

`sampler.sample` reads them in one loop over the blocks. The last row of a shorter block is repeated
as padding, which no evaluation reads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from madformer_jax.diffusion.schedule import Schedule
from madformer_jax.diffusion.solvers import Coefficients, Solver


class BlockTables(NamedTuple):
    """Coefficients of all blocks."""

    rows: Coefficients  # each (L, evaluations)
    evaluations: Any  # (L,) int32, evaluations of each block

    def block(self, block: int | Array) -> Coefficients:
        """Returns the rows of a block, without padding if `block` is a Python number."""
        if isinstance(block, int):
            return jax.tree.map(lambda x: x[block, : self.evaluations[block]], self.rows)
        return jax.tree.map(lambda x: jnp.asarray(x)[block], self.rows)

    def last(self, block: int | Array) -> Any:
        """Returns the index of the last evaluation of a block."""
        last = self.evaluations - 1
        return int(last[block]) if isinstance(block, int) else jnp.asarray(last)[block]


def make(solver: Solver, schedule: Schedule, spacing: str, steps: Sequence[int]) -> BlockTables:
    """Computes the coefficients of each block.

    Args:
      solver: The solver.
      schedule: The noise path.
      spacing: See `Schedule.solver_timesteps`.
      steps: Solver steps of each block.
    """
    tables = {n: solver.coefficients(schedule, spacing, n) for n in set(steps)}
    evaluations = np.array([len(tables[n].index) for n in steps], np.int32)

    def stack(*rows: np.ndarray) -> np.ndarray:
        return np.stack([np.pad(row, (0, evaluations.max() - len(row)), mode="edge") for row in rows])

    return BlockTables(jax.tree.map(stack, *(tables[n] for n in steps)), evaluations)
