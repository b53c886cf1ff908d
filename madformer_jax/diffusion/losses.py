"""The four terms of the training loss (MADFormer, section 3.4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.diffusion import parameterization
from madformer_jax.diffusion.schedule import NUM_TIMESTEPS, add_noise, alpha_sigma
from madformer_jax.models.madformer import MADFormer, ModelOutputs


class LossWeights(NamedTuple):
    """lambda of each term; a term of weight 0 is not computed."""

    image: float = 1.0
    hidden: float = 0.1
    clean: float = 0.0
    text: float = 0.0
    weighting: str = "output"  # how an error of the image counts: as it is, or as one of v (`predicts.weight`)

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(name for name in LOSS_TERMS if getattr(self, name))


def count_predicted_tokens(lengths: Array) -> Array:
    """Counts the tokens that the text term predicts: those of each text but the first."""
    return jnp.sum(lengths - 1)


def unweighted_terms(
    outputs: ModelOutputs,
    z: Array,
    target: Array,
    tokens: Array | None,
    lengths: Array | None = None,
    text_tokens: Array | None = None,
) -> dict[str, Array]:
    """The unweighted terms that the outputs allow: mean squared errors, and the negative log-likelihood of the text.

    Args:
      outputs: of the model.
      z: clean latent blocks (B, L, positions, C).
      target: what the image output is compared with (`predicts.target`), of the same shape; of eps the noise.
      tokens: (B, T); the text term predicts each token from those before it.
      lengths: (B,) tokens of each text; the padding behind them is not predicted. By default all T are text.
      text_tokens: () divisor of the text's negative log-likelihood; by default the number of predicted tokens. A microbatch
        gets the mean number over all microbatches: the mean of their terms is then the term of the whole batch.
    """
    losses = {}
    if outputs.image is not None:
        losses["image"] = jnp.mean((outputs.image - target) ** 2)
    if outputs.hidden is not None:
        losses["hidden"] = jnp.mean((outputs.hidden - z) ** 2)
    if outputs.clean is not None:
        context = slice(0, max(1, z.shape[1] - 1))  # the release leaves out the last block, which is nobody's context
        losses["clean"] = jnp.mean((outputs.clean[:, context] - z[:, context]) ** 2)
    if outputs.text is not None and tokens is not None:
        nll = optax.softmax_cross_entropy_with_integer_labels(outputs.text[:, :-1], tokens[:, 1:])
        if lengths is None:
            losses["text"] = jnp.mean(nll)
        else:
            predicted = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
            count = jnp.maximum(1, jnp.sum(predicted)) if text_tokens is None else text_tokens
            losses["text"] = jnp.sum(nll, where=predicted) / count
    return losses


def training_loss(
    model: MADFormer,
    params: Any,
    z: Array,
    tokens: Array | None,
    key: Array,
    weights: LossWeights,
    context_noise: int = 0,
    lengths: Array | None = None,
    text_tokens: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The weighted loss of one batch, with a timestep of its own for each block.

    Args:
      z: clean latent blocks (B, L, positions, C).
      tokens: text tokens (B, T), or None for an unconditional model.
      key: draws the timesteps and the noise.
      context_noise: the clean blocks, which are the context of those behind them, are noised each at a timestep of its own
        from 0 to this one, which the model is told; 0 leaves them clean.
      lengths: (B,) tokens of each text, the padding behind them left out; None: all T are text.
      text_tokens: see `terms`.

    Returns:
      The loss, and metrics: every term (`loss_image`, ...) and the image term by quarter of the timesteps (`loss_q1` ..
      `loss_q4`, from little to much noise; NaN where no block fell into the quarter).
    """
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, z.shape[:2], 0, NUM_TIMESTEPS, jnp.int32)
    noise = jax.random.normal(noise_key, z.shape, jnp.float32)
    context, told = _add_context_noise(z, jax.random.fold_in(key, 2), context_noise) if context_noise else (z, {})
    outputs = model.apply(
        {"params": params}, context, add_noise(z, noise, t), t, tokens, lengths, terms=weights.terms, **told
    )
    alpha, sigma = alpha_sigma(t)
    target = parameterization.target(model.predicts, z, noise, alpha, sigma)
    losses = unweighted_terms(outputs, z, target, tokens, lengths, text_tokens)
    scale = parameterization.loss_weight(model.predicts, weights.weighting, alpha, sigma)
    if outputs.image is not None and scale is not None:
        losses["image"] = jnp.mean(scale * (outputs.image - target) ** 2)
    loss = sum((getattr(weights, name) * value for name, value in losses.items()), jnp.zeros((), jnp.float32))
    metrics = {"loss": loss} | {f"loss_{name}": value for name, value in losses.items()}
    if outputs.image is not None:
        errors, quarter = jnp.mean((outputs.image - target) ** 2, axis=(2, 3)), t // (NUM_TIMESTEPS // 4)
        errors = errors if scale is None else errors * scale[..., 0, 0]
        for q in range(4):
            metrics[f"loss_q{q + 1}"] = jnp.mean(errors, where=quarter == q)
    return loss, metrics


def _add_context_noise(z: Array, key: Array, most: int) -> tuple[Array, dict[str, Array]]:
    """Clean blocks with noise at timesteps from 0 to `most`, and the model's argument that tells them."""
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, z.shape[:2], 0, most + 1, jnp.int32)
    return add_noise(z, jax.random.normal(noise_key, z.shape, jnp.float32), t), {"clean_t": t}
