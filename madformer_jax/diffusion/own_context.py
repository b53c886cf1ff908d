"""Training on the model's own estimates of earlier blocks (`train.own_context`).

In sampling the model reads earlier blocks that it has drawn, with their errors. In training it reads
true blocks. `replace` gives some examples estimates of their blocks instead, as in Self-Forcing
(arXiv 2506.08009) and SAR (arXiv 2512.06421). The averaged model makes an estimate in one denoising step
from the noised true block. `losses.training_loss` calls `replace`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from madformer_jax.diffusion import parameterization
from madformer_jax.diffusion.schedule import AnyArray, Schedule
from madformer_jax.models.block_order import Order
from madformer_jax.models.madformer import MADFormer


class OwnContext(NamedTuple):
    """The source of the estimates."""

    params: Any  # averaged weights, with the split of the model
    share: float  # of the examples whose clean blocks are replaced
    max_timestep: int  # largest timestep of the noise from which a block is estimated


def replace(
    model: MADFormer,
    source: OwnContext,
    z: Float[Array, "B L positions C"],
    tokens: Int[AnyArray, "B T"] | None,
    lengths: Int[AnyArray, " B"] | None,
    key: Array,
    schedule: Schedule,
    order: Order | None = None,
) -> Float[Array, "B L positions C"]:
    """Replaces all blocks of some examples by estimates, which pass no gradient.

    Args:
      model: The model.
      source: The averaged weights and the settings.
      z: Clean latent blocks, the context of the estimates.
      tokens: Text tokens of the examples.
      lengths: Number of tokens of each text.
      key: Random key of the examples, timesteps and noise.
      schedule: The noise path.
      order: Order of the blocks, see `MADFormer.__call__`.

    Returns:
      The blocks that the model attends to.
    """
    row_key, t_key, noise_key = jax.random.split(key, 3)
    t = schedule.uniform_timesteps(t_key, z.shape[:2], source.max_timestep)
    noisy = schedule.add_noise(z, jax.random.normal(noise_key, z.shape, jnp.float32), t)
    output = model.apply({"params": source.params}, z, noisy, t, tokens, lengths, terms=("image",), order=order).image
    level = schedule.level(t[..., None, None])
    estimates = parameterization.clean_estimate(model.config.prediction_type, output, noisy, level)
    replaced = jax.random.bernoulli(row_key, source.share, (len(z), 1, 1, 1))
    return jnp.where(replaced, jax.lax.stop_gradient(estimates), z)
