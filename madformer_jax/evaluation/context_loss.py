"""Image loss by block, after true blocks and after the model's own estimates of them.

Errors that add up over blocks show as a loss that grows with the number of the block only after
estimates. `modes.probe` calls `losses_by_block`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from madformer_jax.diffusion import own_context, parameterization
from madformer_jax.diffusion.schedule import NUM_TIMESTEPS, Schedule
from madformer_jax.evaluation.split_probe import Batch
from madformer_jax.models.madformer import MADFormer


class BlockLosses(NamedTuple):
    """Mean squared error of the image output for each block, (L,)."""

    true: np.ndarray  # after true blocks, as in training
    estimated: np.ndarray  # after estimates


def losses_by_block(
    model: MADFormer, params: Any, batches: Iterable[Batch], schedule: Schedule, max_timestep: int
) -> BlockLosses:
    """Computes the losses, averaged over batches of equal size.

    Both take the same noise, at timesteps that are uniform for each block. The estimates are those of
    `own_context.replace`.

    Args:
      max_timestep: Largest timestep of the noise from which a block is estimated.
    """

    @jax.jit
    def measure(params: Any, batch: Batch) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
        z, tokens, lengths = batch.z, batch.tokens, batch.lengths
        t_key, noise_key, estimate_key = jax.random.split(batch.key, 3)
        t = schedule.uniform_timesteps(t_key, z.shape[:2], NUM_TIMESTEPS - 1)
        noise, level = jax.random.normal(noise_key, z.shape, jnp.float32), schedule.level(t[..., None, None])
        target = parameterization.target(model.config.prediction_type, z, noise, level)

        def loss(context: Array) -> Float[Array, " L"]:
            noisy = schedule.add_noise(z, noise, t)
            outputs = model.apply({"params": params}, context, noisy, t, tokens, lengths, terms=("image",))
            return jnp.mean((outputs.image - target) ** 2, axis=(0, 2, 3))

        source = own_context.OwnContext(params, 1.0, max_timestep)
        return loss(z), loss(own_context.replace(model, source, z, tokens, lengths, estimate_key, schedule))

    rows = [jax.device_get(measure(params, batch)) for batch in batches]
    return BlockLosses(*np.mean(np.asarray(rows, np.float64), axis=0))
