"""Noise schedule: DDPM linear betas, q(x_t | x_0) and the timesteps of a solver.

`losses` adds noise with it (MADFormer, section 3.4), and `solvers` takes its timesteps from it
(section 4). A new spacing is a branch of `solver_timesteps`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 2e-2


def alphas_cumprod() -> np.ndarray:
    """Returns alpha_bar_t for t = 0..999, float64, from betas rounded to float32 as in PyTorch."""
    betas = np.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=np.float32)
    return np.cumprod(1.0 - betas.astype(np.float64))


def alpha_sigma(t: Array) -> tuple[Array, Array]:
    """Returns sqrt(alpha_bar) and sqrt(1 - alpha_bar), each (B, L, 1, 1), of timesteps (B, L)."""
    alpha_bar = jnp.asarray(alphas_cumprod(), jnp.float32)[t][..., None, None]
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def add_noise(z: Array, noise: Array, t: Array) -> Array:
    """Returns alpha z + sigma noise, a sample of q(z_t | z).

    Args:
      z: Clean latent blocks `(B, L, positions, C)`.
      noise: Standard normal noise of the same shape.
      t: Timestep of each block, `(B, L)`.
    """
    alpha, sigma = alpha_sigma(t)
    return alpha * z + sigma * noise


class SolverTimesteps(NamedTuple):
    """Timesteps of a solver: step k goes from t[k] to next_t[k], where -1 is the clean latent."""

    t: np.ndarray  # (steps,)
    next_t: np.ndarray  # (steps,)


def solver_timesteps(solver: str, spacing: str, steps: int) -> SolverTimesteps:
    """Returns the timesteps of a solver.

    `leading` and `linspace` follow diffusers: for DPM-Solver++ they compute one more timestep than
    for DDIM and drop t = 0. `trailing` starts at t = 999 for both solvers.

    Args:
      solver: `ddim` or `dpmpp_2m`.
      spacing: `trailing`, `leading` or `linspace`.
      steps: Number of solver steps.

    Raises:
      ValueError: The spacing is unknown.
    """
    extra = 1 if solver == "dpmpp_2m" else 0
    if spacing == "trailing":
        t = np.round(np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / steps))[:steps] - 1
    elif spacing == "leading":
        t = (np.arange(steps + extra) * (NUM_TIMESTEPS // (steps + extra)))[::-1][:steps]
    elif spacing == "linspace":
        t = np.round(np.linspace(0, NUM_TIMESTEPS - 1, steps + extra))[::-1][:steps]
    else:
        raise ValueError(f"spacing {spacing!r} is unknown: trailing, leading or linspace")
    t = t.astype(np.int32)
    return SolverTimesteps(t, np.append(t[1:], -1).astype(np.int32))
