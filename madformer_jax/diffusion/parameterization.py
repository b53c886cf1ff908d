"""What the network's output stands for: the noise eps, the velocity v, or the clean latent x0 (`model.prediction_type`).

With the noisy latent x = alpha z + sigma noise (alpha^2 + sigma^2 = 1) all three say the same, v = alpha noise - sigma z
(Salimans & Ho, arXiv 2202.00512). They differ in what a network of limited size can represent, and in how an error of it counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # limits.py, which reads the names below, is there before JAX
    from jax import Array


def target(predicts: str, z: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
    """What the output is compared with; z, noise and it are of one shape."""
    return {"eps": noise, "v": alpha * noise - sigma * z, "x0": z}[predicts]


def clean_estimate(predicts: str, output: Array, x: Array, alpha: Any, sigma: Any) -> Array:
    """The clean latent that an output at the noisy latent x means."""
    if predicts == "x0":
        return output
    return alpha * x - sigma * output if predicts == "v" else (x - sigma * output) / alpha


def loss_weight(predicts: str, weighting: str, alpha: Array, sigma: Array) -> Array | None:
    """What turns a squared error of the output into one of v, where the loss counts that; None for the output's own.

    At a given x an error of v is that of eps over alpha, and that of x0 over sigma.
    """
    if weighting == "output" or predicts == "v":
        return None
    return 1 / (alpha if predicts == "eps" else sigma) ** 2
