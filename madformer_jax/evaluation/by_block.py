"""Loss and quality of each block under true context and under the model's own context (exposure bias).

Three contexts are compared. "true" are the blocks before a block in the same held-out image. "other" are the
blocks of another held-out image of the same label. "own" are blocks that the model sampled with that label.
An image whose label no other held-out image has is left out of the loss of "other" and of the exposure bias.
Neither "own" nor "other" contains the earlier blocks of the same image. The difference of their losses is
therefore the exposure bias: it is 0 if the model's blocks are like real blocks.

For the quality, each block is sampled under the true and under the own context, and compared with the true
blocks at this position by the kernel distance of KID on the values of the block. The distance is unbiased:
equal distributions give 0 on average. Sampling uses the solver of `config.sample` without guidance.

Blocks are numbered in the order of generation, which must be the same for all images.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.diffusion import parameterization, sampler, solvers
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.schedule import NoiseLevel
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import bootstrap, held_out_losses, score_summary, scores
from madformer_jax.evaluation.held_out_images import SEED, HeldOutBatch, HeldOutImages, block_noise, image_keys, shard
from madformer_jax.evaluation.teacher_forcing import TeacherForcing
from madformer_jax.models import block_order
from madformer_jax.models.block_order import Order
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec, generation, solving
from madformer_jax.sampling.opening import TrainedModel

CONTEXTS = ("true", "other", "own")
_NOISE_DRAW, _CONTEXT_DRAW, _SOLVER_STREAM = 500, 501, (1 << 31) + 1


def measure(
    c: ConfigDict, trained: TrainedModel, codec_params: Any, images: HeldOutImages, forward: TeacherForcing
) -> dict[str, np.ndarray]:
    """Measures the loss of each block under the three contexts, and samples blocks.

    Returns:
      `blocks_loss_other` and `blocks_loss_own` (n, L); `has_other` (n,), 1 if another image has the label, else 0;
      the blocks `real`, `sampled_true` and `sampled_own` (n, L, values).

    Raises:
      ConfigError: Less than two images have another image of their label.
    """
    c = c.copy_and_resolve_references()
    c.sample.guidance, c.sample.noise, c.sample.n = 1.0, "", images.n
    batches = list(images.batches(c, trained, codec_params))
    real = _join(batches, [partitioning.to_host(batch.z, trained.mesh) for batch in batches])
    labels = _join(batches, [batch.labels for batch in batches])
    # The samples of an unconditional model have no label, so any other image is comparable with them.
    other = other_of_label(labels if batches[0].tokens is not None else np.zeros_like(labels))
    has_other = _check_others(other)
    samples = _sample_own(c, trained, codec_params, batches, labels)
    contexts = {"other": real[other], "own": samples}
    sample_blocks = _make_block_sampler(c, trained)
    losses: dict[str, list[np.ndarray]] = {name: [] for name in contexts}
    sampled_true = []
    for batch in batches:
        for name, blocks in contexts.items():
            context = shard({"z": blocks[batch.numbers]}, trained.mesh)["z"]
            losses[name].append(held_out_losses.measure_batch(forward, batch, ("image",), context)["blocks_loss_image"])
        sampled = sample_blocks(trained.params, batch.z, batch.device_numbers, batch.tokens, batch.lengths, batch.order)
        sampled_true.append(np.asarray(sampled)[: batch.rows])
    real, samples = (x if batches[0].order is None else x[:, batches[0].order] for x in (real, samples))
    flat = {"real": real, "sampled_true": np.concatenate(sampled_true), "sampled_own": samples}
    return {
        **{f"blocks_loss_{name}": np.concatenate(rows) for name, rows in losses.items()},
        **{name: blocks.reshape(*blocks.shape[:2], -1) for name, blocks in flat.items()},
        "has_other": has_other.astype(np.int8),
    }


def other_of_label(labels: np.ndarray) -> np.ndarray:
    """Returns for each image (n,) the next image of the same label, in a cycle: itself if it is the only one."""
    out = np.arange(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        out[members] = np.roll(members, -1)
    return out


def _check_others(other: np.ndarray) -> np.ndarray:
    """Returns for each image (n,) whether another image has its label."""
    has_other = other != np.arange(len(other))
    if has_other.sum() < 2:
        raise ConfigError(
            f"config.evaluate.by_block=True needs two held-out images of one label, and {len(other)} images have none: set "
            "a larger config.evaluate.held_out_n."
        )
    if not has_other.all():
        logging.warning(
            "%d of %d held-out images are the only ones of their label: the loss after another image and the exposure bias "
            "leave them out. A larger evaluate.held_out_n includes more of them.", (~has_other).sum(), len(other),
        )  # fmt: skip
    return has_other


def table(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns the scores of each block, from the arrays of `measure` and of the losses and bounds.

    Returns:
      For each block its number, its `bits` per dimension, `loss` and `kernel_distance` by context, and
      `exposure_bias` (the loss under "own" minus the loss under "other"). The last score and the loss under
      "other" are means over the images that `has_other` names.
    """
    rows, has_other = [], values["has_other"].astype(bool)
    for i in range(values["blocks_loss_image"].shape[1]):
        loss = {"true": values["blocks_loss_image"][:, i]}
        loss |= {name: values[f"blocks_loss_{name}"][:, i] for name in CONTEXTS[1:]}
        distance = {
            name: _kernel_distance(values[f"sampled_{name}"][:, i], values["real"][:, i]) for name in ("true", "own")
        }
        rows.append({
            "block": i + 1, "bits": score_summary.mean_score(values["blocks_bits"][:, i]),
            "loss": {name: score_summary.mean_score(x[has_other] if name == "other" else x) for name, x in loss.items()},
            "exposure_bias": score_summary.mean_score((loss["own"] - loss["other"])[has_other]),
            "kernel_distance": distance,
        })  # fmt: skip
    return rows


def text_table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the scores of `table` as a Markdown table."""
    lines = ["| block | bits | loss, true | other | own | exposure bias | KID, true | own |", "|" + "---|" * 8]
    for row in rows:
        cells = [row["bits"], *row["loss"].values(), row["exposure_bias"], *row["kernel_distance"].values()]
        texts = [f"{x['value']:.3g} [{x['low']:.3g}, {x['high']:.3g}]" for x in cells]
        lines.append(f"| {' | '.join([str(row['block']), *texts])} |")
    return "\n".join(lines)


def _kernel_distance(sampled: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Returns the unbiased squared kernel distance over all pairs, with an interval over both sets of images."""
    x, y = sampled.astype(np.float64), real.astype(np.float64)
    value = scores.unbiased_kernel_distance(x, y)
    counts = (bootstrap.resample_counts(len(a), seed=SEED + i) for i, a in enumerate((x, y)))
    replicates = scores.weighted_kernel_distances(x, y, *counts)
    return {"value": value, **bootstrap.interval(value, replicates)._asdict()}


def _join(batches: list[HeldOutBatch], arrays: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(x)[: batch.rows] for batch, x in zip(batches, arrays, strict=True)])


def _sample_own(
    c: ConfigDict, trained: TrainedModel, codec_params: Any, batches: list[HeldOutBatch], labels: np.ndarray
) -> np.ndarray:
    """Samples an image with the label or caption of each held-out image; returns blocks (n, L, positions, C)."""
    texts = None
    if batches[0].lengths is not None:
        texts = TokenizedTexts(
            *(
                _join(batches, [partitioning.to_host(getattr(b, name), trained.mesh) for b in batches])
                for name in ("tokens", "lengths")
            )
        )
    conditions = generation.SampleConditions(labels.astype(np.int32), None, texts)
    sample_fn = generation.make_sample_fn(c, trained.network, trained.codec.decode)
    sample_batches = generation.batches(
        c, sample_fn, trained.params, codec_params, trained.mesh, range(len(labels)), conditions=conditions
    )
    sizes = derive_sizes(c)
    return np.concatenate([codec.to_blocks(batch.latents, sizes) for batch in sample_batches])


def _make_block_sampler(c: ConfigDict, trained: TrainedModel) -> Any:
    """Returns a function that samples every block of images given the true blocks before it, with `sample.context_noise`.

    All blocks take the solver's steps together, in the forward pass of training. The function takes blocks in
    raster order, and returns them in the order of generation.
    """
    sizes, path = derive_sizes(c), schedules.make(**c.diffusion)
    solver, clip_x0, model = solvers.make(c.sample.solver), c.sample.clip_x0, trained.network
    steps = solving.solver_steps(c)
    assert isinstance(steps, int)  # `held_out_scores.open_images` refuses others
    coefficients = solver.coefficients(path, c.sample.spacing, steps)
    clean_timestep = sampler.clean_timestep(model, coefficients, c.sample.context_noise)

    def draw(
        params: Any, z: Array, numbers: Array, tokens: Array | None, lengths: Array | None, order: Order | None = None
    ) -> Array:
        if c.sample.context_noise:
            t = jnp.full(z.shape[:2], c.sample.context_noise)
            z = path.add_noise(z, block_noise(numbers, _CONTEXT_DRAW, sizes), t)
        z, noise = (block_order.to_generation_order(x, order) for x in (z, block_noise(numbers, _NOISE_DRAW, sizes)))

        def evaluate(state: solvers.SolverState, row: solvers.Coefficients) -> tuple[solvers.SolverState, None]:
            def denoise(x: Array, level: NoiseLevel) -> tuple[Any, None]:
                t = jnp.full(x.shape[:2], level.t)
                clean_t = jnp.full(x.shape[:2], clean_timestep, t.dtype)
                image = model.apply(
                    {"params": params}, z, x, t, tokens, lengths, clean_t=clean_t, terms=("image",), order=order
                ).image.astype(jnp.float32)
                return parameterization.clean_estimate(model.config.prediction_type, image, x, level, clip_x0), None

            def normal() -> Array:
                keys = jax.vmap(lambda key: jax.random.fold_in(key, row.index))(image_keys(numbers, _SOLVER_STREAM))
                return generation.keyed_noise(keys, sizes.block_shape)

            return solver.step(denoise, state, row, normal)[0], None

        state = solver.init(noise)
        return jax.lax.scan(evaluate, state, jax.tree.map(jnp.asarray, coefficients))[0].x

    return jax.jit(draw, out_shardings=partitioning.replicated(trained.mesh))
