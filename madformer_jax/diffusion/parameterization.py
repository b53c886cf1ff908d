"""Prediction types of the network: the noise eps, the velocity v, or the clean latent x0.

With the noisy latent x = alpha z + sigma noise (alpha^2 + sigma^2 = 1) the three types are
equivalent, v = alpha noise - sigma z (Salimans & Ho, arXiv 2202.00512). They differ in what a
network of limited size can represent, and in the weight that the loss gives its errors.

`losses` reads the targets and weights, and `solvers` the clean estimate. A new type is a case of
each function and a name in `config.choices.PREDICTION_TYPES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # JAX is needed for the annotations only
    from jax import Array


def target(prediction_type: str, z: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
    """Returns the target of the network's output; z, noise and target have the same shape."""
    return {"eps": noise, "v": alpha * noise - sigma * z, "x0": z}[prediction_type]


def clean_estimate(prediction_type: str, output: Array, x: Array, alpha: Any, sigma: Any) -> Array:
    """Converts an output at the noisy latent x to an estimate of the clean latent."""
    if prediction_type == "x0":
        return output
    return alpha * x - sigma * output if prediction_type == "v" else (x - sigma * output) / alpha


def loss_weight(prediction_type: str, weighting: str, alpha: Array, sigma: Array) -> Array | None:
    """Returns the factor that turns a squared error of the output into one of v.

    At a given x an error of v is an error of eps over alpha, and an error of x0 over sigma.

    Args:
      prediction_type: "eps", "v" or "x0".
      weighting: "v" for errors of v, or "output" for errors of the output itself.
      alpha: sqrt(alpha_bar) of each block.
      sigma: sqrt(1 - alpha_bar), of the same shape.

    Returns:
      The factor, or None if it is 1.
    """
    if weighting == "output" or prediction_type == "v":
        return None
    return 1 / (alpha if prediction_type == "eps" else sigma) ** 2
