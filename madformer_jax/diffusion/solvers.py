"""Solvers for the reverse process: DDIM and DPM-Solver++ (2M) (MADFormer, section 4).

Every step of either solver is linear in the sample and the clean estimates x0 of this step and the
previous one (`parameterization.clean_estimate`):

    x' = x_weight x + x0_weight x0 + previous_x0_weight (previous x0)

`coefficients` computes the weights once, in float64. `sampler.BlockSteps.step` then calls `step` for
every solver step. A new solver is a branch of `coefficients`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from madformer_jax.diffusion import schedule
from madformer_jax.diffusion.parameterization import clean_estimate


class Coefficients(NamedTuple):
    """Coefficients of a solver, each (steps,), or scalars for one step."""

    t: np.ndarray  # timestep at which the network is evaluated
    alpha: np.ndarray  # sqrt(alpha_bar) at t
    sigma: np.ndarray  # sqrt(1 - alpha_bar) at t
    x_weight: np.ndarray
    x0_weight: np.ndarray
    previous_x0_weight: np.ndarray


class SolverState(NamedTuple):
    """The sample x and the clean estimate x0 of the latest step, of the same shape."""

    x: Array
    x0: Array


def coefficients(solver: str, spacing: str, steps: int) -> Coefficients:
    """Returns the coefficients of a solver.

    Args:
      solver: `ddim` (eta 0), or `dpmpp_2m` (midpoint, first order at the first and the last step).
      spacing: See `schedule.solver_timesteps`.
      steps: Number of solver steps.

    Raises:
      ValueError: The solver or the spacing is unknown.
    """
    t, next_t = schedule.solver_timesteps(solver, spacing, steps)
    alpha_bar = np.append(schedule.alphas_cumprod(), 1.0)  # index -1 is the clean latent
    alpha, sigma = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
    next_alpha, next_sigma = np.sqrt(alpha_bar[next_t]), np.sqrt(1 - alpha_bar[next_t])
    x_weight = next_sigma / sigma
    x0_weight = next_alpha - alpha * x_weight
    previous_x0_weight = np.zeros(steps)
    if solver == "dpmpp_2m":
        half_log_snr = np.log(alpha / sigma)  # lambda of DPM-Solver
        # Increase of lambda in each step but the last. The last step is first order: its lambda
        # ends at infinity.
        lambda_increase = np.diff(half_log_snr)
        for k in range(1, steps - 1):
            correction = x0_weight[k] * lambda_increase[k] / (2 * lambda_increase[k - 1])
            x0_weight[k] += correction
            previous_x0_weight[k] = -correction
    elif solver != "ddim":
        raise ValueError(f"solver {solver!r} is unknown: ddim or dpmpp_2m")
    rows = (np.asarray(x, np.float32) for x in (alpha, sigma, x_weight, x0_weight, previous_x0_weight))
    return Coefficients(t, *rows)


def step_rows(coefficients: Coefficients) -> list[Coefficients]:
    """Splits coefficients into one row of scalars for each step."""
    return [Coefficients(*row) for row in zip(*coefficients)]


def initial_state(noise: Array) -> SolverState:
    """Returns the state before the first step, whose previous estimate has weight 0."""
    return SolverState(noise, jnp.zeros_like(noise))


def step(
    state: SolverState, output: Array, row: Coefficients, clip_x0: float = 0.0, prediction_type: str = "eps"
) -> SolverState:
    """Runs one solver step.

    Args:
      state: The sample and the previous clean estimate.
      output: The network's output for the sample, of the same shape.
      row: Coefficients of this step.
      clip_x0: Bounds the clean estimate to [-clip_x0, clip_x0]; 0 turns it off.
      prediction_type: Type of the output: "eps", "v" or "x0".

    Returns:
      The next sample and this step's clean estimate.
    """
    x0 = clean_estimate(prediction_type, output, state.x, row.alpha, row.sigma)
    if clip_x0:
        x0 = jnp.clip(x0, -clip_x0, clip_x0)
    x = row.x_weight * state.x + row.x0_weight * x0 + row.previous_x0_weight * state.x0
    return SolverState(x, x0)
