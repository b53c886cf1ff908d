"""Errors of a model on held-out images, block by block, in one forward pass of training.

Each block is predicted from the true blocks before it, or from another context that the caller passes.
Batches have their blocks in raster order. Noise levels and errors are in the order of generation.
`held_out_losses`, `bits_per_dimension` and `by_block` weight and average the errors.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr
from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.diffusion import parameterization
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.schedule import NoiseLevel
from madformer_jax.evaluation.held_out_images import HeldOutBatch, block_noise, shard
from madformer_jax.models import block_order
from madformer_jax.models.block_order import Order
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning

_HALF_BIN = 1 / 255  # half the distance of two values of an 8-bit pixel in [-1, 1]


class Levels(NamedTuple):
    """Timestep and noise level of each block, NumPy float64 (B, L)."""

    t: Any
    alpha: Any
    sigma: Any


class BlockErrors(NamedTuple):
    """Errors of each block, NumPy float64 (rows, L), and estimates; None for terms that were not requested."""

    image: Any  # image term of the training loss: mean over the block, weighted by `loss.weighting`
    hidden: Any
    clean: Any
    squared: Any  # squared error of the clean estimate, summed over the block
    x0: Any  # clean estimate (B, L, positions, C), on the devices


class TeacherForcing:
    """A model that predicts each block from the blocks before it.

    The clean estimate is that of the sampler: with `sample.clip_x0`, and without guidance.
    """

    def __init__(self, c: ConfigDict, model: MADFormer, params: Any, mesh: jax.sharding.Mesh):
        self.sizes, self.schedule, self.mesh = derive_sizes(c), schedules.make(**c.diffusion), mesh
        self.discrete = c.codec.name == "pixel"  # whether the latents are 8-bit pixels
        self._params, whole = params, partitioning.replicated(mesh)
        self._program = jax.jit(
            functools.partial(
                _block_errors,
                model=model,
                schedule=self.schedule,
                sizes=self.sizes,
                weighting=c.loss.weighting,
                clip_x0=c.sample.clip_x0,
            ),
            static_argnames=("terms", "zero_context_timestep"),
            out_shardings=BlockErrors(whole, whole, whole, whole, partitioning.batch_sharding(mesh)),
        )
        self._decoder_program = jax.jit(functools.partial(_decoder_terms, discrete=self.discrete), out_shardings=whole)

    def errors(
        self,
        batch: HeldOutBatch,
        draw: int,
        levels: Levels,
        *,
        terms: tuple[str, ...] = ("image",),
        context: Array | None = None,
        zero_context_timestep: bool = False,
    ) -> BlockErrors:
        """Evaluates the model once on all blocks of a batch.

        Args:
          draw: Number of the draw of noise.
          levels: Noise level of each block.
          terms: Terms of the loss to compute, with "image".
          context: Blocks (B, L, positions, C) that later blocks read, in raster order; by default those of
            the batch.
          zero_context_timestep: Whether the context has timestep 0, also if `clean_timestep` is "noisy".
        """
        arrays = shard({name: x.astype(np.float32) for name, x in levels._asdict().items()}, self.mesh)
        outputs = self._program(
            self._params, batch.z if context is None else context, batch.z, batch.device_numbers, np.uint32(draw), arrays,
            batch.tokens, batch.lengths, batch.order, terms=terms, zero_context_timestep=zero_context_timestep,
        )  # fmt: skip
        means = jax.tree.map(lambda x: np.asarray(x, np.float64)[: batch.rows], outputs._replace(x0=None))
        return means._replace(x0=outputs.x0)

    def decoder(self, batch: HeldOutBatch, x0: Array, deviations: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Returns the nats of each clean block under mixtures of Gaussians around an estimate, float64 (rows, L).

        Args:
          x0: Estimate of `errors`, the mean of all Gaussians.
          deviations: S standard deviations for each image (B, S).
          weights: Their probabilities (B, S), above 0.
        """
        inputs = {"deviations": deviations, "logs": np.log(weights)}
        arrays = shard({name: x.astype(np.float32) for name, x in inputs.items()}, self.mesh)
        nats = self._decoder_program(batch.z, x0, arrays["deviations"], arrays["logs"], batch.order)
        return np.asarray(nats, np.float64)[: batch.rows]


def decoder_nats(x: Array, mean: Array, deviation: Array, discrete: bool) -> Array:
    """Returns -log p(x) of a Gaussian, elementwise.

    Args:
      x: Values. If `discrete`, 8-bit pixels in [-1, 1].
      mean: Mean.
      deviation: Standard deviation.
      discrete: If True, p is the probability of the pixel's bin, and the outer bins are unbounded (Ho et
        al., arXiv 2006.11239, equation 13). Otherwise p is the density.
    """
    if not discrete:
        return 0.5 * ((x - mean) / deviation) ** 2 + jnp.log(deviation) + 0.5 * np.log(2 * np.pi)
    lower = jnp.where(x < -1 + _HALF_BIN, -jnp.inf, (x - _HALF_BIN - mean) / deviation)
    upper = jnp.where(x > 1 - _HALF_BIN, jnp.inf, (x + _HALF_BIN - mean) / deviation)
    # In the lower tail differences of the distribution function keep their digits.
    flip = x > mean
    lower, upper = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    return -log_ndtr(upper) - jnp.log1p(-jnp.exp(log_ndtr(lower) - log_ndtr(upper)))


def _decoder_terms(
    z: Array, x0: Array, deviations: Array, logs: Array, order: Order | None, *, discrete: bool
) -> Array:
    z = block_order.to_generation_order(z, order)

    def add(total: Array, gaussian: tuple[Array, Array]) -> tuple[Array, None]:
        deviation, log_weight = (x[:, None, None, None] for x in gaussian)
        return jnp.logaddexp(total, log_weight - decoder_nats(z, x0, deviation, discrete)), None

    total, _ = jax.lax.scan(add, jnp.full(z.shape, -jnp.inf), (deviations.T, logs.T))
    return -jnp.sum(total, axis=(2, 3))


def _block_errors(
    params: Any,
    context: Array,
    z: Array,
    numbers: Array,
    draw: Array,
    levels: dict[str, Array],
    tokens: Array | None,
    lengths: Array | None,
    order: Order | None,
    *,
    terms: tuple[str, ...],
    zero_context_timestep: bool,
    model: MADFormer,
    schedule: schedules.Schedule,
    sizes: Any,
    weighting: str,
    clip_x0: float,
) -> BlockErrors:
    t, prediction_type = levels["t"], model.config.prediction_type
    alpha, sigma = (levels[name][..., None, None] for name in ("alpha", "sigma"))
    level = NoiseLevel(t[..., None, None], alpha, sigma, *schedule.velocity(alpha, sigma))
    noise = block_noise(numbers, draw, sizes)
    context, z, noise = (block_order.to_generation_order(x, order) for x in (context, z, noise))
    noisy = alpha * z + sigma * noise
    clean_t = jnp.zeros_like(t) if zero_context_timestep else None
    outputs = model.apply(
        {"params": params}, context, noisy, t, tokens, lengths, clean_t=clean_t, terms=terms, order=order
    )
    output = outputs.image.astype(jnp.float32)
    scale = parameterization.loss_weight(prediction_type, weighting, level)
    error = (output - parameterization.target(prediction_type, z, noise, level)) ** 2
    x0 = parameterization.clean_estimate(prediction_type, output, noisy, level, clip_x0)
    return BlockErrors(
        image=jnp.mean(error if scale is None else scale * error, axis=(2, 3)),
        hidden=None if outputs.hidden is None else jnp.mean((outputs.hidden - z) ** 2, axis=(2, 3)),
        clean=None if outputs.clean is None else jnp.mean((outputs.clean - z) ** 2, axis=(2, 3)),
        squared=jnp.sum((x0 - z) ** 2, axis=(2, 3)),
        x0=x0,
    )
