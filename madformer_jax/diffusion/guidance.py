"""Scales of classifier-free guidance for each solver step.

The scale is constant or grows over the steps, at all timesteps or in an interval of them.
`sampling.generation` computes the scales, and `sampler.BlockSteps.step` mixes the two predictions
with them. A new schedule is a branch of `guidance_scales`.
"""

from collections.abc import Sequence

import numpy as np


def guidance_scales(scale: float, schedule: str, interval: Sequence[int], t: np.ndarray) -> np.ndarray:
    """Returns the guidance scale w of each solver step, (steps,) float32.

    A scale of 1 uses the conditional prediction alone.

    Args:
      scale: w of `constant`, and of the last step of `linear`.
      schedule: `constant` or `linear`. `linear` grows in the step number from 1 at the first step,
        which has the most noise, to `scale` at the last (arXiv 2404.13040). Muse and MAR grow their
        scale over the tokens they finish, which would be blocks here and not solver steps.
      interval: Lowest and highest timestep with guidance (arXiv 2404.07724). w is 1 at all others.
      t: Timestep of each step, `(steps,)`.

    Raises:
      ValueError: The schedule is unknown.
    """
    if schedule == "constant":
        w = np.full(len(t), scale)
    elif schedule == "linear":
        w = np.linspace(1, scale, len(t)) if len(t) > 1 else np.array([scale])
    else:
        raise ValueError(f"guidance schedule {schedule!r} is unknown: constant or linear")
    low, high = interval
    return np.where((low <= t) & (t <= high), w, 1).astype(np.float32)
