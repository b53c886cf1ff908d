"""The four terms of the training loss (MADFormer, section 3.4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from madformer_jax.diffusion.schedule import TIMESTEPS, add_noise
from madformer_jax.models.madformer import MADFormer, Outputs


class Weights(NamedTuple):
    """lambda of each term; a term of weight 0 is not computed."""

    image: float = 1.0
    hidden: float = 0.1
    clean: float = 0.0
    text: float = 0.0

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(name for name, weight in self._asdict().items() if weight)


def terms(outputs: Outputs, z: Array, noise: Array, tokens: Array | None) -> dict[str, Array]:
    """The unweighted terms that the outputs allow: mean squared errors, and the negative log-likelihood of the text.

    Args:
      outputs: of the model.
      z, noise: clean latent blocks and the noise put on them, (B, L, positions, C).
      tokens: (B, T); the text term predicts each token from those before it.
    """
    losses = {}
    if outputs.eps is not None:
        losses["image"] = jnp.mean((outputs.eps - noise) ** 2)
    if outputs.hidden is not None:
        losses["hidden"] = jnp.mean((outputs.hidden - z) ** 2)
    if outputs.clean is not None:
        context = slice(0, max(1, z.shape[1] - 1))  # the release leaves out the last block, which is nobody's context
        losses["clean"] = jnp.mean((outputs.clean[:, context] - z[:, context]) ** 2)
    if outputs.text is not None and tokens is not None:
        nll = optax.softmax_cross_entropy_with_integer_labels(outputs.text[:, :-1], tokens[:, 1:])
        losses["text"] = jnp.mean(nll)
    return losses


def training_loss(
    model: MADFormer, params: Any, z: Array, tokens: Array | None, key: Array, weights: Weights
) -> tuple[Array, dict[str, Array]]:
    """The weighted loss of one batch, with a timestep of its own for each block.

    Args:
      z: clean latent blocks (B, L, positions, C).
      tokens: text tokens (B, T), or None for an unconditional model.
      key: draws the timesteps and the noise.

    Returns:
      The loss, and metrics: every term (`loss_image`, ...) and the image term by quarter of the timesteps (`loss_q1` ..
      `loss_q4`, from little to much noise; NaN where no block fell into the quarter).
    """
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, z.shape[:2], 0, TIMESTEPS)
    noise = jax.random.normal(noise_key, z.shape)
    outputs = model.apply({"params": params}, z, add_noise(z, noise, t), t, tokens, terms=weights.terms)
    losses = terms(outputs, z, noise, tokens)
    loss = sum((getattr(weights, name) * value for name, value in losses.items()), jnp.zeros(()))
    metrics = {"loss": loss} | {f"loss_{name}": value for name, value in losses.items()}
    if outputs.eps is not None:
        errors, quarter = jnp.mean((outputs.eps - noise) ** 2, axis=(2, 3)), t // (TIMESTEPS // 4)
        for q in range(4):
            metrics[f"loss_q{q + 1}"] = jnp.mean(errors, where=quarter == q)
    return loss, metrics
