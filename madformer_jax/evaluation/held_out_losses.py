"""Losses of training on held-out images, with the same noise and timesteps for every model.

Each block is evaluated once in each quarter of the timesteps. Within a quarter the timesteps follow the
distribution of training. The quarters are weighted by their share of this distribution. `loss_image` is
therefore an unbiased estimate of the training loss on these images, with three differences: the context is
the true blocks (without `train.context_noise` and `train.own_context`), no label is dropped, and D is that
of sampling.
"""

from collections.abc import Iterable

import numpy as np
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.diffusion.losses import QUARTER, LossWeights
from madformer_jax.diffusion.schedule import Schedule
from madformer_jax.evaluation.held_out_images import SEED, HeldOutBatch
from madformer_jax.evaluation.teacher_forcing import Levels, TeacherForcing

QUARTERS = 4
GOLDEN_RATIO = (5**0.5 - 1) / 2


def measure(c: ConfigDict, forward: TeacherForcing, batches: Iterable[HeldOutBatch]) -> dict[str, np.ndarray]:
    """Measures the losses of each image.

    Returns:
      `loss_image`, `loss_q1` to `loss_q4` and, if they have a weight, `loss_hidden` and `loss_clean`, each
      (n,); `blocks_loss_image` (n, L), the image loss of each block.
    """
    terms = tuple(name for name in LossWeights(**c.loss).terms if name in ("hidden", "clean"))
    rows = [measure_batch(forward, batch, ("image", *terms)) for batch in batches]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def measure_batch(
    forward: TeacherForcing, batch: HeldOutBatch, terms: tuple[str, ...], context: Array | None = None
) -> dict[str, np.ndarray]:
    """Measures the losses of the images of a batch, see `measure`; `context` as in `TeacherForcing.errors`."""
    blocks = forward.sizes.blocks
    shares = quarter_shares(forward.schedule)
    by_draw = [
        forward.errors(batch, draw, timesteps(forward.schedule, batch.numbers, blocks, draw), terms=terms,
                       context=context)
        for draw in range(QUARTERS)
    ]  # fmt: skip
    # In draw d, block b is in quarter (d + b) mod 4.
    order = (np.arange(QUARTERS)[:, None] - np.arange(blocks)) % QUARTERS  # (quarter, block) -> draw

    def by_quarter(name: str) -> np.ndarray:
        draws = np.stack([getattr(errors, name) for errors in by_draw])  # (draw, image, block)
        return draws[order, :, np.arange(blocks)].transpose(0, 2, 1)  # (quarter, image, block)

    image = by_quarter("image")
    out = {"blocks_loss_image": np.einsum("q,qnb->nb", shares, image)}
    out["loss_image"] = out["blocks_loss_image"].mean(axis=1)
    out |= {f"loss_q{q + 1}": image[q].mean(axis=1) for q in range(QUARTERS)}
    context_blocks = {"hidden": blocks, "clean": max(1, blocks - 1)}  # the clean term leaves out the last block
    for name in terms[1:]:
        mean = by_quarter(name)[:, :, : context_blocks[name]].mean(axis=2)
        out[f"loss_{name}"] = shares @ mean
    return out


def timesteps(schedule: Schedule, numbers: np.ndarray, blocks: int, draw: int) -> Levels:
    """Returns the noise levels (n, L) of one of the four draws.

    Args:
      numbers: Numbers of the images (n,).
      blocks: L.
      draw: In draw d, block b is in quarter (d + b) mod 4 of the timesteps.
    """
    bounds = np.concatenate([[0], np.cumsum(quarter_shares(schedule))])
    quarter = (draw + np.arange(blocks)) % QUARTERS
    u = bounds[quarter] + (bounds[quarter + 1] - bounds[quarter]) * low_discrepancy(numbers, blocks, draw)
    t = schedule.training_quantiles(u.clip(max=np.nextafter(1, 0)))
    return Levels(t, *schedule.alpha_sigma(t.astype(int) if has_whole_timesteps(schedule) else t))


def low_discrepancy(numbers: np.ndarray, blocks: int, stream: int) -> np.ndarray:
    """Returns numbers in [0, 1) for each image and block (n, L): multiples of the golden ratio, shifted.

    They fill the interval evenly along the images. The shift of each block and stream is random, so that
    each number is uniformly distributed.
    """
    shifts = np.random.default_rng((SEED, stream)).random(blocks)
    return (shifts + np.asarray(numbers, np.float64)[:, None] * GOLDEN_RATIO) % 1.0


def quarter_shares(schedule: Schedule) -> np.ndarray:
    """Returns the share of the training timesteps in each quarter of the timesteps, (4,)."""
    low, high = np.zeros(QUARTERS - 1), np.ones(QUARTERS - 1)
    limits = QUARTER * np.arange(1.0, QUARTERS)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = schedule.training_quantiles(middle) < limits
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.diff(np.concatenate([[0], high, [1]]))


def has_whole_timesteps(schedule: Schedule) -> bool:
    """Returns whether the path is defined at integer timesteps only, as the path of DDPM is."""
    return np.issubdtype(np.dtype(schedule.dtype), np.integer)
