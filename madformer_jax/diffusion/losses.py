"""The four terms of the training loss: image, hidden, clean and text (MADFormer, section 3.4).

`training.train_step` differentiates `training_loss`. A new term is a field of `LossWeights`, a
branch of `unweighted_terms` and a name in `config.choices.LOSS_TERMS`. Shapes use the letters of the
legend in `models.madformer`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, Real

from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.diffusion import own_context as own_contexts
from madformer_jax.diffusion import parameterization
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.schedule import AnyArray, Schedule
from madformer_jax.models import block_order
from madformer_jax.models.block_order import Order
from madformer_jax.models.madformer import MADFormer, ModelOutputs

QUARTER = schedules.NUM_TIMESTEPS // 4  # timesteps in each of the metrics loss_q1 to loss_q4


class LossWeights(NamedTuple):
    """Weight lambda of each term (`config.loss`); a term of weight 0 is not computed."""

    image: float = 1.0
    hidden: float = 0.1
    clean: float = 0.0
    text: float = 0.0
    weighting: str = "output"  # weight of the image's error (`parameterization.loss_weight`)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that have a weight."""
        weights = {name: getattr(self, name) for name in LOSS_TERMS}
        # A traced weight is not 0 (`training.lanes`).
        return tuple(name for name, weight in weights.items() if isinstance(weight, Array) or weight)


def count_predicted_tokens(lengths: Int[AnyArray, "..."]) -> Int[Array, ""]:
    """Counts the tokens that the text term predicts: all tokens of each text except the first."""
    return jnp.sum(lengths - 1)


def unweighted_terms(
    outputs: ModelOutputs,
    z: Float[AnyArray, "B L positions C"],
    target: Float[AnyArray, "B L positions C"],
    tokens: Int[AnyArray, "B T"] | None,
    lengths: Int[AnyArray, " B"] | None = None,
    text_tokens: Real[AnyArray, ""] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Computes the unweighted terms for which an output exists.

    Image, hidden and clean are mean squared errors, and text is a mean negative log-likelihood.

    Args:
      outputs: Outputs of the model.
      z: Clean latent blocks `(B, L, positions, C)`.
      target: Target of the image output, of the same shape (`parameterization.target`).
      tokens: Text tokens `(B, T)`. The text term predicts each token from those before it.
      lengths: Number of tokens of each text, `(B,)`. Padding behind them is not predicted. By
        default all T tokens are text.
      text_tokens: Divisor of the text's negative log-likelihood, a scalar. By default the number of
        predicted tokens. Microbatches pass the mean number over all microbatches, so that the mean
        of their terms is the term of the whole batch.

    Returns:
      The terms by name, each a scalar.
    """
    losses = {}
    if outputs.image is not None:
        losses["image"] = jnp.mean((outputs.image - target) ** 2)
    if outputs.hidden is not None:
        losses["hidden"] = jnp.mean((outputs.hidden - z) ** 2)
    if outputs.clean is not None:
        # The release leaves out the last block, which no other block attends to.
        context = slice(0, max(1, z.shape[1] - 1))
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
    z: Float[Array, "B L positions C"],
    tokens: Int[AnyArray, "B T"] | None,
    key: Array,
    weights: LossWeights,
    context_noise: int = 0,
    lengths: Int[AnyArray, " B"] | None = None,
    text_tokens: Real[AnyArray, ""] | None = None,
    schedule: Schedule = schedules.DEFAULT,
    own_context: own_contexts.OwnContext | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the weighted loss of one batch, with a separate timestep for each block.

    Args:
      model: The model.
      params: Its parameters.
      z: Clean latent blocks `(B, L, positions, C)`, in raster order.
      tokens: Text tokens `(B, T)`, or None for an unconditional model.
      key: Random key of the timesteps and the noise.
      weights: Weights of the terms.
      context_noise: Highest timestep of noise on the clean blocks, which later blocks attend to.
        Each block draws its timestep from 0 to this one, and the model receives it. 0 leaves the
        blocks clean.
      lengths: Number of tokens of each text, `(B,)`. By default all T tokens are text.
      text_tokens: See `unweighted_terms`.
      schedule: The noise path.
      own_context: Source of estimates that replace clean blocks, before `context_noise` is added. None
        leaves the true blocks.

    Returns:
      The loss and the metrics. Metrics hold every term (`loss_image`, ...), and the image term by
      quarter of the timesteps, from little to much noise (`loss_q1` to `loss_q4`). A quarter without
      blocks is NaN.
    """
    order = training_order(model, key, len(z))
    z = block_order.to_generation_order(z, order)
    t_key, noise_key = jax.random.split(key)
    t = schedule.training_timesteps(t_key, z.shape[:2])
    noise = jax.random.normal(noise_key, z.shape, jnp.float32)
    context, clean_t = z, None
    if own_context is not None:
        own_key = jax.random.fold_in(key, 3)
        context = own_contexts.replace(model, own_context, z, tokens, lengths, own_key, schedule, order)
    if context_noise:
        context, clean_t = _add_context_noise(schedule, context, jax.random.fold_in(key, 2), context_noise)
    level = schedule.level(t[..., None, None])
    noisy = level.alpha * z + level.sigma * noise
    outputs = model.apply(
        {"params": params}, context, noisy, t, tokens, lengths, clean_t=clean_t, terms=weights.terms, order=order
    )
    target = parameterization.target(model.config.prediction_type, z, noise, level)
    losses = unweighted_terms(outputs, z, target, tokens, lengths, text_tokens)
    scale = parameterization.loss_weight(model.config.prediction_type, weights.weighting, level)
    errors = None
    if outputs.image is not None:
        errors = (outputs.image - target) ** 2
        errors = errors if scale is None else scale * errors
        losses["image"] = jnp.mean(errors)
    loss = sum((getattr(weights, name) * value for name, value in losses.items()), jnp.zeros((), jnp.float32))
    metrics = {"loss": loss} | {f"loss_{name}": value for name, value in losses.items()}
    if errors is not None:
        by_block, quarter = jnp.mean(errors, axis=(2, 3)), t // QUARTER
        for q in range(4):
            metrics[f"loss_q{q + 1}"] = jnp.mean(by_block, where=quarter == q)
    return loss, metrics


def training_order(model: MADFormer, key: Array, batch: int) -> Order | None:
    """Returns the order of the blocks: the model's own, or a random one for each image.

    Args:
      model: The model.
      key: Random key of the batch.
      batch: Number of images.
    """
    if model.config.block_order != "random":
        return model.config.default_order
    key = jax.random.fold_in(key, 4)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))
    return block_order.image_orders("random", model.config.sizes, keys)


def _add_context_noise(
    schedule: Schedule, z: Float[Array, "B L positions C"], key: Array, max_timestep: int
) -> tuple[Float[Array, "B L positions C"], Real[Array, "B L"]]:
    """Adds noise at random timesteps 0..max_timestep; returns noisy blocks and timesteps."""
    t_key, noise_key = jax.random.split(key)
    t = schedule.uniform_timesteps(t_key, z.shape[:2], max_timestep)
    return schedule.add_noise(z, jax.random.normal(noise_key, z.shape, jnp.float32), t), t
