"""Classifier-free guidance (CFG): the guided prediction, and the scale of each evaluation of a solver.

The scale is constant or grows over the steps, at all timesteps or in an interval of them.
`sampling.solving` computes the scales, and `sampler.BlockSteps.step` calls `guide`. A new schedule is a
branch of `guidance_scales`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Real


def guide(output: Float[Array, "..."], w: Any) -> Float[Array, "..."]:
    """Returns guide + w (conditional - guide), for eps, v and x0 alike (arXiv 2207.12598).

    Args:
      output: The conditional rows, followed by those of the null token or of the guide model.
      w: Guidance scale. 1 gives the conditional prediction.
    """
    conditional, unconditional = jnp.split(output, 2)
    return unconditional + w * (conditional - unconditional)


def guidance_scales(
    scale: float, schedule: str, interval: Sequence[int], t: Real[np.ndarray, " evaluations"]
) -> Float[np.ndarray, " evaluations"]:
    """Returns the guidance scale w of each evaluation, float32.

    A scale of 1 uses the conditional prediction alone.

    Args:
      scale: w of `constant`, and of the last step of `linear`.
      schedule: `constant` or `linear`. `linear` grows evenly from 1 at the first timestep, which
        has the most noise, to `scale` at the last (arXiv 2404.13040). Muse and MAR instead
        grow their scale over the finished tokens, which correspond to blocks here.
      interval: Lowest and highest timestep with guidance (arXiv 2404.07724). w is 1 at all others.
      t: Timestep of each evaluation, in descending order.

    Raises:
      ValueError: The schedule is unknown.
    """
    if schedule == "constant":
        w = np.full(len(t), scale)
    elif schedule == "linear":
        timesteps, position = np.unique(-t, return_inverse=True)
        w = np.linspace(1, scale, len(timesteps))[position] if len(timesteps) > 1 else np.full(len(t), scale)
    else:
        raise ValueError(f"guidance schedule {schedule!r} is unknown: constant or linear")
    low, high = interval
    t = np.maximum(t, 0)  # fine steps of a continuous path go below 0
    return np.where((low <= t) & (t <= high), w, 1).astype(np.float32)
