"""Training on the model's own estimates of earlier blocks (`train.own_context`).

In sampling the model reads earlier blocks that it has drawn, with their errors. In training it reads
true blocks. `replace` gives some examples estimates of their blocks instead, as in Self-Forcing
(arXiv 2506.08009) and SAR (arXiv 2512.06421). The averaged model makes an estimate from the noised true
block: in one denoising step, or in a short rollout of several solver steps (`rollout`). Every block reads
the true blocks before it, so all blocks are estimated together. `losses.training_loss` calls `replace`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from madformer_jax.diffusion import parameterization
from madformer_jax.diffusion.schedule import AnyArray, Schedule
from madformer_jax.diffusion.solvers import ddim_weights
from madformer_jax.models.block_order import Order
from madformer_jax.models.madformer import MADFormer
from madformer_jax.models.parallel_denoising import ParallelDenoiser


class OwnContext(NamedTuple):
    """The source of the estimates."""

    params: Any  # averaged weights, with the split of the model
    share: float  # of the examples whose clean blocks are replaced
    max_timestep: int  # largest timestep of the noise from which a block is estimated
    steps: int = 1  # solver steps of an estimate


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
    estimates: Any
    if source.steps > 1:
        estimates = rollout(model, source.params, z, noisy, t, tokens, lengths, schedule, source.steps, order)
    else:
        output = model.apply(
            {"params": source.params}, z, noisy, t, tokens, lengths, terms=("image",), order=order
        ).image
        level = schedule.level(t[..., None, None])
        estimates = parameterization.clean_estimate(model.config.prediction_type, output, noisy, level)
    replaced = jax.random.bernoulli(row_key, source.share, (len(z), 1, 1, 1))
    return jnp.where(replaced, jax.lax.stop_gradient(estimates), z)


def rollout(
    model: MADFormer,
    params: Any,
    z: Float[Array, "B L positions C"],
    noisy: Float[Array, "B L positions C"],
    t: Num[Array, "B L"],
    tokens: Int[AnyArray, "B T"] | None,
    lengths: Int[AnyArray, " B"] | None,
    schedule: Schedule,
    steps: int,
    order: Order | None = None,
    *,
    unroll: bool = False,
) -> Float[Array, "B L positions C"]:
    """Denoises all blocks in DDIM steps without guidance, each block given the true blocks before it.

    The AR layers run once and the diffusion layers at every step. The steps of a block are those of the
    sampler with spacing `trailing`, started at the block's own timestep.

    Args:
      model: The model.
      params: Its parameters.
      z: Clean latent blocks, of which each block reads the earlier ones.
      noisy: Noisy latent blocks.
      t: Timestep of each noisy block.
      tokens: Text tokens of the examples.
      lengths: Number of tokens of each text.
      schedule: The noise path.
      steps: Number of solver steps.
      order: Order of the blocks, see `MADFormer.__call__`.
      unroll: Compiles one copy of a step per step, to count the cost.

    Returns:
      The clean estimates after the last step.
    """
    config, denoiser, variables = model.config, ParallelDenoiser(model.config), {"params": params}
    timesteps = schedule.timesteps_to_clean(t, steps)
    # As in sampling, finished blocks have the timestep of the last evaluation or 0.
    clean_t = timesteps[-2] if config.clean_timestep == "noisy" else jnp.zeros_like(t)
    conditions = denoiser.apply(variables, z, clean_t, tokens, lengths, order, method="condition_blocks")

    def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        now, after = (schedule.level(end[..., None, None]) for end in ends)
        output = denoiser.apply(variables, conditions, x, ends[0], order, method="denoise_blocks")
        x0: Any = parameterization.clean_estimate(config.prediction_type, output, x, now)
        x_weight, x0_weight = ddim_weights(now, after)
        return x_weight * x + x0_weight * x0, None

    return jax.lax.scan(step, noisy, (timesteps[:-1], timesteps[1:]), unroll=steps if unroll else 1)[0]
