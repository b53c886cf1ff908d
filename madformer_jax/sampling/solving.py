"""The solver and the noise path of a config: coefficients, guidance scales, entries of protocols.

`generation` and `trained_model` draw with them. Modes that store images or scores put them into their
protocols.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config import schema
from madformer_jax.diffusion import guidance, solvers
from madformer_jax.diffusion import schedule as schedules


def guidance_scales(c: ConfigDict) -> np.ndarray:
    """Returns the guidance scale of each evaluation in a block, float32 (evaluations,)."""
    s = c.sample
    t = coefficients(c).level.t
    return guidance.guidance_scales(s.guidance, s.guidance_schedule, s.guidance_interval, t)


def coefficients(c: ConfigDict) -> solvers.Coefficients:
    """Returns the coefficients of the config's solver, steps and noise path."""
    return solvers.make(c.sample.solver).coefficients(schedules.make(**c.diffusion), c.sample.spacing, c.sample.steps)


def path_protocol(c: ConfigDict) -> dict[str, Any]:
    """Returns the noise path for a protocol; empty for the default path, which older protocols do not name."""
    values = c.diffusion.to_dict()
    return {} if values == schema.base().diffusion.to_dict() else {"diffusion": values}


def depends_on_seed(c: ConfigDict) -> bool:
    """Returns whether the seed decides the images, if labels and the initial noise are given."""
    return coefficients(c).noise_weight is not None
