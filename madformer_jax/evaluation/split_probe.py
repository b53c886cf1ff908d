"""The split probe: where a trained model could be cut into AR layers and diffusion layers.

A layer belongs to the AR layers if it computes nearly the same at every solver step. SCD
(arXiv 2602.10095) finds such layers by the similarity of their features across steps and by their
attention to other blocks. The probe adds the same noise to held-out images at the noise levels of the
solver steps. `modes.probe` calls `measure` and `suggest_depth`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from madformer_jax.diffusion import parameterization
from madformer_jax.diffusion.schedule import Schedule
from madformer_jax.models.layerwise import LayerwiseMADFormer, Reuse, Trace
from madformer_jax.models.madformer import MADFormer


class Batch(NamedTuple):
    """Images to probe with."""

    z: Array  # (B, L, positions, C), latent blocks
    tokens: Array | None  # (B, T)
    lengths: Array | None  # (B,)
    key: Array  # random key of the noise


class Measures(NamedTuple):
    """Results of the probe. N layers, K solver steps, D diffusion layers."""

    timesteps: np.ndarray  # (K,), from the first solver step to the last
    to_first: np.ndarray  # (N, K), cosine similarity of features to those of the first step
    to_previous: np.ndarray  # (N, K - 1), to those of the step before
    masses: np.ndarray  # (N, 3), attention to earlier blocks, to the own block and to the text
    reuse_loss: dict[int, float]  # number of first layers that are reused, N - D to N -> loss at later steps


# (params, batch, timestep, trace of the first step or None, number of reused layers) -> trace, image loss
_Step = Callable[..., tuple[Trace, Array]]


def measure(
    model: MADFormer, params: Any, batches: Iterable[Batch], schedule: Schedule, spacing: str, steps: int
) -> Measures:
    """Measures similarity, attention and the loss under reuse, averaged over batches of equal size.

    The similarity is that of the hidden states of the prediction stream, averaged over tokens. The
    attention is averaged over steps, heads, tokens and, if L > 1, over the blocks that have earlier ones.

    `reuse_loss` is the image loss of all steps but the first, if the first layers run at the first step
    only. Later steps reuse their output, with the embedded noisy blocks of the current step in place of
    those of the first step. The smallest number of reused layers is N - D, because the AR layers run once
    in any case.

    Args:
      spacing: See `Schedule.solver_timesteps`.
      steps: K, number of solver steps.
    """
    timesteps = schedule.solver_timesteps(spacing, steps)[:-1].astype(schedule.dtype)
    step = _make_step(model, schedule)
    rows = [_measure_batch(model, step, params, batch, timesteps) for batch in batches]
    return Measures(
        timesteps,
        to_first=np.mean([row.to_first for row in rows], axis=0),
        to_previous=np.mean([row.to_previous for row in rows], axis=0),
        masses=np.mean([row.masses for row in rows], axis=0),
        reuse_loss={m: float(np.mean([row.reuse_loss[m] for row in rows])) for m in rows[0].reuse_loss},
    )


def _make_step(model: MADFormer, schedule: Schedule) -> _Step:
    """Returns the compiled program of a step."""
    layerwise, prediction_type = LayerwiseMADFormer(model.config), model.config.prediction_type

    @functools.partial(jax.jit, static_argnames="layers")
    def step(
        params: Any, batch: Batch, t: Any, first: Trace | None = None, layers: int = 0
    ) -> tuple[Trace, Float[Array, ""]]:
        noise = jax.random.normal(batch.key, batch.z.shape, jnp.float32)
        times = jnp.full(batch.z.shape[:2], t)
        noisy, level = schedule.add_noise(batch.z, noise, times), schedule.level(times[..., None, None])
        reuse = None if first is None else Reuse(layers, first.features[layers - 1], first.embedded)
        args = batch.z, noisy, times, batch.tokens, batch.lengths, reuse
        trace = layerwise.apply({"params": params}, *args, method="trace")
        return trace, jnp.mean((trace.image - parameterization.target(prediction_type, batch.z, noise, level)) ** 2)

    return step


@jax.jit
def _similarity(a: Trace, b: Trace) -> Float[Array, " N"]:
    """Returns the mean cosine similarity of the features of each layer."""
    x, y = (trace.features.astype(jnp.float32) for trace in (a, b))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, axis=-1) / norms, axis=(1, 2, 3))


def _measure_batch(model: MADFormer, step: _Step, params: Any, batch: Batch, timesteps: np.ndarray) -> Measures:
    """Measures one batch. It keeps the traces of three steps at most."""
    n, ar_depth = model.config.depth, model.config.depth - model.config.diffusion_depth
    to_first, to_previous, masses = [], [], []
    losses: dict[int, list[float]] = {m: [] for m in range(ar_depth, n + 1)}
    first = previous = None
    for t in timesteps:
        trace, loss = step(params, batch, t)
        first = trace if first is None else first
        to_first.append(_similarity(first, trace))
        has_earlier = min(1, trace.masses.shape[2] - 1)  # the first block has no earlier ones
        masses.append(jnp.mean(trace.masses[:, :, has_earlier:], axis=(1, 2)))
        if previous is not None:
            to_previous.append(_similarity(previous, trace))
            losses[ar_depth].append(float(loss))
            for m in range(ar_depth + 1, n + 1):
                losses[m].append(float(step(params, batch, t, first, m)[1]))
        previous = trace
    return Measures(
        timesteps,
        to_first=np.asarray(jnp.stack(to_first, axis=1)),
        to_previous=np.asarray(jnp.stack(to_previous, axis=1)),
        masses=np.mean(np.asarray(jnp.stack(masses)), axis=0),
        reuse_loss={m: float(np.mean(x)) for m, x in losses.items()},
    )


def suggest_depth(reuse_loss: dict[int, float], depth: int, tolerance: float) -> int:
    """Returns the smallest D whose AR layers can be reused at little loss.

    The AR layers of D are the first N - D layers. A D qualifies if reusing them, and reusing any fewer layers,
    raises the loss by at most the share `tolerance`. At least one layer stays a diffusion layer.

    Args:
      reuse_loss: See `Measures`.
      depth: N.
      tolerance: Largest relative increase of the loss.
    """
    limit = (1 + tolerance) * reuse_loss[min(reuse_loss)]
    reused = min(reuse_loss)
    for m in sorted(reuse_loss):
        if reuse_loss[m] > limit or m == depth:
            break
        reused = m
    return depth - reused
