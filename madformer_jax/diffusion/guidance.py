"""The scale of classifier-free guidance at each solver step: constant or growing, everywhere or in an interval of timesteps."""

from collections.abc import Sequence

import numpy as np


def guidance_scales(scale: float, schedule: str, interval: Sequence[int], t: np.ndarray) -> np.ndarray:
    """The scale w of each solver step, (steps,) float32; 1 is the conditional branch alone.

    Args:
      scale: w of `constant`, and of the last step of `linear`.
      schedule: `constant`; or `linear` in the number of the step, from 1 at the first (most noise) to `scale` at the last
        (arXiv 2404.13040). Muse and MAR grow theirs from 1 as well, but over the tokens that they finish one after the
        other, which would be our blocks, not over the solver steps of each.
      interval: the lowest and the highest timestep with guidance (arXiv 2404.07724); w is 1 at all others.
      t: (steps,), timestep of each step.

    Raises:
      ValueError: the schedule is unknown.
    """
    if schedule == "constant":
        w = np.full(len(t), scale)
    elif schedule == "linear":
        w = np.linspace(1, scale, len(t)) if len(t) > 1 else np.array([scale])
    else:
        raise ValueError(f"guidance schedule {schedule!r} is unknown: constant or linear")
    low, high = interval
    return np.where((low <= t) & (t <= high), w, 1).astype(np.float32)
