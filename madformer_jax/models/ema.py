"""Power-function averages of parameters, and their combination after training.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models"
(EDM2, arXiv 2312.02696), section 3 and appendix C. An average at step t weights the parameters of
step i by i^gamma, so that its width is a constant share of the training so far. The width sigma_rel
is the standard deviation of this profile over t. `training.train_step` tracks the two averages of
`PROFILES`, checkpoints store them, and `sampling.opening` combines them into any other width.

The exponential moving average (EMA) of constant decay is `optax.incremental_update`, in
`training.train_step`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

PROFILES = {"narrow": 0.05, "wide": 0.10}  # name in checkpoints -> sigma_rel


def exponent(width: float) -> float:
    """Returns gamma of the power function with the relative width sigma_rel, section 3.1."""
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2
    t = width**-2.0
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def update(average: Any, params: Any, width: float, step: Array) -> Any:
    """Returns the average of relative width `width` after a step.

    Its decay is (1 - 1 / step)^(gamma + 1), section 3.1. At step 1 it is `params` itself.

    Args:
      average: The average of the step before.
      params: The parameters of the step.
      width: sigma_rel.
      step: Steps done, from 1.
    """
    # expm1 and log1p keep the digits of 1 - decay, which is about (gamma + 1) / step.
    new_share = -jnp.expm1((exponent(width) + 1) * jnp.log1p(-1.0 / step))
    return optax.incremental_update(params, average, new_share)


class Combination(NamedTuple):
    """Weights of stored averages that approximate another average."""

    weights: np.ndarray  # (snapshots, profiles of `PROFILES`) float64
    error: float  # distance of the combined from the wanted profile, relative to the norm of the wanted one


def combine(steps: Sequence[int], width: float) -> Combination:
    """Returns the weights of snapshots that come nearest to the average of a width at the last step.

    They are the least-squares solution of algorithm 3 in appendix C. Their sum is held at 1, so that
    parameters that do not move keep their values even if there are few snapshots.

    Args:
      steps: Step of each snapshot, ascending. Each snapshot holds the averages of `PROFILES`.
      width: sigma_rel of the average that is wanted.
    """
    gammas = np.array([exponent(profile) for profile in PROFILES.values()])
    t, gamma = np.repeat(np.asarray(steps) / steps[-1], len(gammas)), np.tile(gammas, len(steps))
    wanted = np.ones(1), np.array([exponent(width)])
    gram = _inner_products(t, gamma, t, gamma)
    right = _inner_products(t, gamma, *wanted)
    ones = np.ones((len(t), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])  # with a Lagrange multiplier
    weights = np.linalg.lstsq(system, np.append(right, [[1.0]], axis=0), rcond=None)[0][:-1]
    norm = _inner_products(*wanted, *wanted)
    residual = norm - 2 * right.T @ weights + weights.T @ gram @ weights
    error = float(np.sqrt(max(0.0, residual.item()) / norm.item()))
    return Combination(weights.reshape(len(steps), len(gammas)), error)


def _inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Returns the integrals over p_a p_b, (a, b), where p(i) = (gamma + 1) i^gamma / t^(gamma + 1) up to t."""
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    longer = np.maximum(t_a, t_b)
    # The product is zero after the earlier of the two ends.
    ratio = np.where(t_a < t_b, (t_a / longer) ** gamma_b, (t_b / longer) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / longer
