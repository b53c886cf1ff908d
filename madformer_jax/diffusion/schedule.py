"""The noise schedule: DDPM linear betas, q(x_t | x_0) and the timesteps of a solver (MADFormer, sections 3.4 and 4)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 2e-2


def alphas_cumprod() -> np.ndarray:
    """alpha_bar_t for t = 0 .. 999, float64 from betas rounded to float32, as PyTorch computes them."""
    betas = np.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=np.float32)
    return np.cumprod(1.0 - betas.astype(np.float64))


def alpha_sigma(t: Array) -> tuple[Array, Array]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of timesteps (B, L), each (B, L, 1, 1)."""
    alpha_bar = jnp.asarray(alphas_cumprod(), jnp.float32)[t][..., None, None]
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def add_noise(z: Array, noise: Array, t: Array) -> Array:
    """q(z_t | z): alpha z + sigma noise, for z (B, L, positions, C) and t (B, L)."""
    alpha, sigma = alpha_sigma(t)
    return alpha * z + sigma * noise


class SolverTimesteps(NamedTuple):
    """What a solver visits, in order: step k goes from t[k] to previous[k]; -1 is the clean end."""

    t: np.ndarray
    previous: np.ndarray


def solver_timesteps(solver: str, spacing: str, steps: int) -> SolverTimesteps:
    """The `steps` timesteps of a solver; every step is done, and it ends where the next one starts.

    `leading` and `linspace` follow diffusers, where DPM-Solver++ lays one more point than DDIM and leaves out t = 0;
    `trailing` starts at t = 999 for both.

    Raises:
      ValueError: the spacing is unknown.
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
