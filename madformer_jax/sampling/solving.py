"""The solver and the noise path of a config: coefficients, guidance scales, entries of protocols.

`generation` and `trained_model` draw with them. Modes that store images or scores put them into their
protocols.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config import block_orders, block_steps, schema
from madformer_jax.diffusion import guidance, solvers
from madformer_jax.diffusion import schedule as schedules

T = TypeVar("T")
MIN_PADDED_SIZE = 64


def solver_steps(c: ConfigDict) -> int | tuple[int, ...]:
    """Returns the solver steps of a block, or those of each block if they differ."""
    steps = block_steps.steps_of_blocks(c)
    return steps if len(set(steps)) > 1 else steps[0]


def guidance_scales(c: ConfigDict) -> np.ndarray:
    """Returns the guidance scale of each evaluation in a block, float32 (evaluations,).

    If the blocks differ in steps, the shape is (L, evaluations). Rows of shorter blocks end in padding.
    """
    steps = solver_steps(c)
    if isinstance(steps, int):
        return block_guidance_scales(c, 0)
    rows = [block_guidance_scales(c, block) for block in range(len(steps))]
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=1) for row in rows])


def block_guidance_scales(c: ConfigDict, block: int) -> np.ndarray:
    """Returns the guidance scale of each evaluation in one block, float32 (evaluations,)."""
    s = c.sample
    t = coefficients(c, block).level.t
    return guidance.guidance_scales(s.guidance, s.guidance_schedule, s.guidance_interval, t)


def coefficients(c: ConfigDict, block: int = 0) -> solvers.Coefficients:
    """Returns the coefficients of the config's solver and noise path, with the steps of a block."""
    steps = block_steps.steps_of_blocks(c)[block]
    return solvers.make(c.sample.solver).coefficients(schedules.make(**c.diffusion), c.sample.spacing, steps)


def evaluations(c: ConfigDict) -> int:
    """Returns the evaluations of the network in a block of `sample.steps` solver steps."""
    return solvers.make(c.sample.solver).evaluations(c.sample.steps)


def padded_size(evaluations: int) -> int:
    """Returns the length to which coefficients are padded: the same for most sweeps, so that they share programs."""
    return max(MIN_PADDED_SIZE, 1 << (evaluations - 1).bit_length())


def pad_steps(program: Callable[..., T], c: ConfigDict, size: int) -> Callable[..., T]:
    """Returns a sampling program with the solver steps, spacing and noise path of a config as its arguments.

    Args:
      program: The program of `generation.make_sample_fn`, which compiles once for each size.
      c: The config. Its solver is that of the program.
      size: A length for all configs that share the program, see `padded_size`.
    """
    padded, scales = solvers.pad(coefficients(c), size), guidance_scales(c)
    scales = np.pad(scales, (0, size - len(scales)), mode="edge")

    def call(params: Any, codec_params: Any, inputs: Any) -> T:
        return program(params, codec_params, inputs._replace(guidance=scales, coefficients=padded))

    return call


def path_protocol(c: ConfigDict) -> dict[str, Any]:
    """Returns the noise path for a protocol; empty for the default path, which older protocols do not name."""
    values = c.diffusion.to_dict()
    return {} if values == schema.base().diffusion.to_dict() else {"diffusion": values}


def depends_on_seed(c: ConfigDict) -> bool:
    """Returns whether the seed decides the images, if labels and the initial noise are given."""
    is_stochastic = coefficients(c).noise_weight is not None or c.sample.context_noise > 0
    return is_stochastic or block_orders.sampling_order_name(c) == "random"
