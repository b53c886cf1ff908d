"""Prediction types of the network: the noise eps, the velocity v, or the clean latent x0.

At a noisy latent x = alpha z + sigma noise the three types are equivalent. v = a noise - b z is the
velocity of the path, and a alpha + b sigma = 1 on every path (`schedule.Schedule.velocity`). It is
alpha noise - sigma z if alpha^2 + sigma^2 = 1, and noise - z on the flow path. The types differ in
what a network of limited size can represent, and in the weight that the loss gives its errors.

`losses` reads the targets and weights, and `sampler` the clean estimate. From an estimate x0, that of the
noise is eps = (x - alpha x0) / sigma; `solvers.ddim_weights` contains it. A new type is a case of
each function and a name in `config.choices.PREDICTION_TYPES`. A new weighting is a branch of
`loss_weight` and a name in `config.choices.LOSS_WEIGHTINGS`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from madformer_jax.diffusion.schedule import AnyArray, NoiseLevel

MIN_SNR_GAMMA = 5.0  # of Hang et al., arXiv 2303.09556


def target(
    prediction_type: str, z: Float[AnyArray, " *shape"], noise: Float[AnyArray, " *shape"], level: NoiseLevel
) -> Float[AnyArray, " *shape"]:
    """Returns the target of the network's output."""
    if prediction_type == "v":
        return level.v_noise * noise - level.v_clean * z
    return noise if prediction_type == "eps" else z


def clean_estimate(
    prediction_type: str,
    output: Float[AnyArray, " *shape"],
    x: Float[AnyArray, " *shape"],
    level: NoiseLevel,
    clip_x0: float = 0.0,
) -> Float[AnyArray, " *shape"]:
    """Converts an output at the noisy latent x to an estimate of the clean latent.

    Values are clipped to [-clip_x0, clip_x0] unless the bound is 0.
    """
    x0: Any = output
    if prediction_type == "v":
        x0 = level.v_noise * x - level.sigma * output
    elif prediction_type == "eps":
        x0 = (x - level.sigma * output) / level.alpha
    return jnp.clip(x0, -clip_x0, clip_x0) if clip_x0 else x0


def loss_weight(prediction_type: str, weighting: str, level: NoiseLevel) -> Float[AnyArray, "..."] | None:
    """Returns the factor of the squared error of the output.

    At a given x an error of v is an error of eps over alpha, and an error of x0 over sigma.

    Args:
      prediction_type: "eps", "v" or "x0".
      weighting: "output" for errors of the output itself, "v" for errors of v, or "min_snr" for
        errors of x0 times min(alpha^2 / sigma^2, 5) (Hang et al., arXiv 2303.09556, section 3.4).
      level: Noise level of each block.

    Returns:
      The factor, in the shape of `level.alpha`, or None if it is 1.
    """
    alpha, sigma = level.alpha, level.sigma
    if weighting == "min_snr":
        at_high_noise = {"eps": 1.0, "v": alpha**2, "x0": (alpha / sigma) ** 2}[prediction_type]
        at_low_noise = {"eps": (sigma / alpha) ** 2, "v": sigma**2, "x0": 1.0}[prediction_type]
        return jnp.minimum(at_high_noise, MIN_SNR_GAMMA * at_low_noise)
    if weighting == "output" or prediction_type == "v":
        return None
    return 1 / (alpha if prediction_type == "eps" else sigma) ** 2
