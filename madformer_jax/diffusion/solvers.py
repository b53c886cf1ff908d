"""DDIM and DPM-Solver++ (2M), both as one set of coefficients (MADFormer, section 4).

With the clean estimate x0 that the network's output means (`predicts.clean_estimate`), every step of either solver is linear:
x' = on_x x + on_x0 x0 + on_previous (x0 of the step before). They are computed once in float64.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from madformer_jax.diffusion import schedule
from madformer_jax.diffusion.parameterization import clean_estimate


class Coefficients(NamedTuple):
    """One row a step, each (steps,)."""

    t: np.ndarray  # timestep at which the network is evaluated
    alpha: np.ndarray
    sigma: np.ndarray
    on_x: np.ndarray
    on_x0: np.ndarray
    on_previous: np.ndarray


class SolverState(NamedTuple):
    """The sample and the clean estimate of the step before, same shape."""

    x: Array
    x0: Array


def coefficients(solver: str, spacing: str, steps: int) -> Coefficients:
    """Coefficients of `steps` steps: `ddim` (eta 0) or `dpmpp_2m` (midpoint, first order at the first and the last step).

    Raises:
      ValueError: the solver or the spacing is unknown.
    """
    t, previous = schedule.solver_timesteps(solver, spacing, steps)
    alpha_bar = np.append(schedule.alphas_cumprod(), 1.0)  # index -1: no noise left
    alpha, sigma = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
    next_alpha, next_sigma = np.sqrt(alpha_bar[previous]), np.sqrt(1 - alpha_bar[previous])
    on_x = next_sigma / sigma
    on_x0 = next_alpha - alpha * on_x
    on_previous = np.zeros(steps)
    if solver == "dpmpp_2m":
        log_snr = np.log(alpha / sigma)
        width = np.diff(log_snr)  # h of steps 0 .. steps - 2; the last one ends at infinity and is first order
        for k in range(1, steps - 1):
            second = on_x0[k] * width[k] / (2 * width[k - 1])
            on_x0[k] += second
            on_previous[k] = -second
    elif solver != "ddim":
        raise ValueError(f"solver {solver!r} is unknown: ddim or dpmpp_2m")
    rows = (np.asarray(x, np.float32) for x in (alpha, sigma, on_x, on_x0, on_previous))
    return Coefficients(t, *rows)


def step_rows(coefficients: Coefficients) -> list[Coefficients]:
    """One for each step, of numbers."""
    return [Coefficients(*row) for row in zip(*coefficients)]


def initial_state(noise: Array) -> SolverState:
    return SolverState(noise, jnp.zeros_like(noise))


def step(state: SolverState, output: Array, row: Coefficients, clip: float = 0.0, predicts: str = "eps") -> SolverState:
    """One solver step with the network's output and one row of coefficients.

    Args:
      clip: > 0 bounds the clean estimate to [-clip, clip].
      predicts: what the output stands for: eps, v or x0.
    """
    x0 = clean_estimate(predicts, output, state.x, row.alpha, row.sigma)
    if clip:
        x0 = jnp.clip(x0, -clip, clip)
    return SolverState(row.on_x * state.x + row.on_x0 * x0 + row.on_previous * state.x0, x0)
