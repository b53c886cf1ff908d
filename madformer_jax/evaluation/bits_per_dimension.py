"""Bits per dimension: a variational bound on -log2 p(image), divided by the number of values of the image.

The bound is a sum over blocks, each conditioned on the true blocks before it (teacher forcing). Models of
any number of blocks therefore bound the same quantity. With SNR = alpha^2 / sigma^2 and the clean estimate x of the model,
the bound of a block z is, in nats (Kingma et al., arXiv 2107.00630, equations 11 to 15):

    prior      KL(q(z_999 | z) || N(0, I))
    diffusion  1/2 times the integral of E |z - x(z_t, t)|^2 d SNR(t), from SNR(999) to SNR(start)
    decoder    E -log p(z | z_start), with p a mixture of Gaussians around x for each value

On 8-bit pixels p is the probability of the pixel's bin. On other latents p is a density, and the bound is that
of the latents.

The bound holds for any start and any mixture that do not depend on the scored image. A pilot over 64 images
chooses both. The Gaussians have standard deviations of FACTORS times the root mean square error at the start,
and weights that maximize the likelihood. The start is the one of RATIOS (alpha / sigma, on every path) with the
least bound. Images with even numbers are scored with the choice of the images with odd numbers, and the other
way around.

A path of integer timesteps (DDPM) has two bounds. `bits_per_dimension` is the integral, as on every path: the
log of the SNR is linear between integer timesteps, and the network reads fractional timesteps.
`bits_per_dimension_discrete` is the sum over the steps t from start + 1 to 999 of
1/2 (SNR(t - 1) - SNR(t)) E |z - x(z_t, t)|^2, and has a start of its own. It is the bound of the `ancestral`
sampler with 1,000 steps and the variance of q(z_(t-1) | z_t, z) (Ho et al., arXiv 2006.11239), which stops at
the start. It is looser, because its first steps are coarse.

Timesteps are drawn by importance: their density is proportional to the root mean square of the integrand in the
pilot. The pilot and the scores have different noise, so the estimate is unbiased.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from madformer_jax.diffusion.schedule import MAX_TIMESTEP, Schedule
from madformer_jax.evaluation.held_out_images import SEED, HeldOutBatch
from madformer_jax.evaluation.held_out_losses import has_whole_timesteps, low_discrepancy
from madformer_jax.evaluation.teacher_forcing import Levels, TeacherForcing, decoder_nats
from madformer_jax.models import block_order
from madformer_jax.runtime import partitioning

RATIOS = tuple(100 * 2.0**-k for k in range(14))  # alpha / sigma at the starts; the last is almost only noise
FACTORS = tuple(2.0**k for k in range(-8, 2))  # of the root mean square error, for the decoder's deviations
MIN_DEVIATION = 1e-3  # an eighth of the distance of two values of an 8-bit pixel
DRAWS = 4  # timesteps of each image and block
PILOT_IMAGES, BINS = 64, 32
VALUES, ITERATIONS = 8192, 40  # values and steps to which the weights of the decoder are fitted
_UNIFORM_SHARE = 0.1  # of the density, so that no weight is large
_UNIFORM_WEIGHT = 1e-3  # of the mixture, so that no weight is 0
# First draws of noise and streams of timesteps. Losses use those from 0 on.
_DECODER_DRAW, _PILOT_DRAW, _INTEGRAL_DRAW, _SUM_DRAW = 100, 200, 300, 400
SETTINGS = {
    "ratios": list(RATIOS), "factors": list(FACTORS), "draws": DRAWS,
    "pilot": [PILOT_IMAGES, BINS, VALUES, ITERATIONS], "version": 2,
}  # fmt: skip

Batches = Callable[[int | None], Iterable[HeldOutBatch]]  # first n images, or all


class Pilot(NamedTuple):
    """Means over the blocks of some images at the K noise levels of RATIOS, float64 (K,).

    S is the number of FACTORS.
    """

    log_snr: np.ndarray
    squared: np.ndarray  # squared error of a block
    size: np.ndarray  # root mean square of `squared`
    decoder: np.ndarray  # nats of a block
    deviations: np.ndarray  # (K, S), of the Gaussians of the decoder
    weights: np.ndarray  # (K, S), their probabilities


class Bound(NamedTuple):
    """A variational bound: where it starts, and the distribution of its timesteps."""

    first: Levels  # floats
    deviations: np.ndarray  # (S,), of the Gaussians of the decoder
    weights: np.ndarray  # (S,), their probabilities
    pilot_nats: float  # decoder and diffusion terms of a block in the pilot, the latter down to the last of RATIOS
    sample: Callable[[np.ndarray], tuple[Levels, np.ndarray]]  # uniform numbers -> noise levels, weights


def measure(forward: TeacherForcing, batches: Batches) -> dict[str, np.ndarray]:
    """Measures the bound of each image.

    Returns:
      `bits_per_dimension` (n,) and, for a path of whole timesteps, `bits_per_dimension_discrete` (n,);
      `blocks_bits` (n, L), the bound of each block in bits per dimension of the block; `decoder_ratio` (n,),
      the alpha / sigma of the start of `bits_per_dimension`.
    """
    bounds = bounds_of(forward.schedule, run_pilot(forward, batches(PILOT_IMAGES)))
    rows = [measure_batch(forward, batch, bounds) for batch in batches(None)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def bounds_of(
    schedule: Schedule, pilots: Sequence[Pilot], starts: Sequence[int] = range(len(RATIOS))
) -> dict[str, list[Bound]]:
    """Returns the bounds of images with even and with odd numbers, by name. `starts` indexes the allowed RATIOS."""
    bounds = {"bits_per_dimension": [integral_bound(schedule, pilot, starts) for pilot in pilots]}
    if has_whole_timesteps(schedule):
        bounds["bits_per_dimension_discrete"] = [sum_bound(schedule, pilot, starts) for pilot in pilots]
    return bounds


def measure_batch(
    forward: TeacherForcing, batch: HeldOutBatch, bounds: dict[str, list[Bound]]
) -> dict[str, np.ndarray]:
    """Measures the bound of each image of a batch, see `measure`."""
    z = _host_blocks(forward, batch)
    last = _levels(forward.schedule, np.array([float(MAX_TIMESTEP)]))
    variance = last.sigma**2
    prior = 0.5 * np.sum(last.alpha**2 * z**2 + variance - 1 - np.log(variance), axis=(2, 3))
    by_block = {}
    for i, (name, pair) in enumerate(bounds.items()):
        nats = prior + _decoder(forward, batch, _DECODER_DRAW + i, pair)
        nats += _diffusion(forward, batch, (_INTEGRAL_DRAW, _SUM_DRAW)[i], pair)
        by_block[name] = nats / (z.shape[2] * z.shape[3] * np.log(2))
    parity, pair = batch.numbers[: batch.rows] % 2, bounds["bits_per_dimension"]
    return {name: bits.mean(axis=1) for name, bits in by_block.items()} | {
        "blocks_bits": by_block["bits_per_dimension"],
        "decoder_ratio": np.array([bound.first.alpha / bound.first.sigma for bound in pair])[parity],
    }


def _decoder(forward: TeacherForcing, batch: HeldOutBatch, draw: int, pair: Sequence[Bound]) -> np.ndarray:
    """Returns the decoder term of each block in nats (n, L)."""
    parity = batch.numbers % 2
    values = np.array([bound.first for bound in pair])[parity]  # (B, 3)
    levels = Levels(*np.repeat(values.T[:, :, None], forward.sizes.blocks, axis=2))
    deviations, weights = (np.array([getattr(b, name) for b in pair])[parity] for name in ("deviations", "weights"))
    return forward.decoder(
        batch, forward.errors(batch, draw, levels, zero_context_timestep=True).x0, deviations, weights
    )


def _diffusion(forward: TeacherForcing, batch: HeldOutBatch, first_draw: int, pair: Sequence[Bound]) -> np.ndarray:
    """Returns the diffusion term of each block in nats (n, L), a mean over draws."""
    odd, terms = batch.numbers[:, None] % 2 == 1, []
    for k in range(DRAWS):
        numbers = batch.numbers.astype(np.int64) * DRAWS + k
        u = low_discrepancy(numbers, forward.sizes.blocks, first_draw)
        (even_levels, even_weights), (odd_levels, odd_weights) = (bound.sample(u) for bound in pair)
        levels = Levels(*(np.where(odd, b, a) for a, b in zip(even_levels, odd_levels)))
        weights = np.where(odd, odd_weights, even_weights)[: batch.rows]
        terms.append(weights * forward.errors(batch, first_draw + k, levels, zero_context_timestep=True).squared)
    return np.mean(terms, axis=0)


def run_pilot(forward: TeacherForcing, batches: Iterable[HeldOutBatch]) -> list[Pilot]:
    """Runs the pilot.

    Returns:
      The pilot over images with odd numbers, which serves images with even numbers, and the opposite pilot.
    """
    batches = list(batches)
    odd = np.concatenate([batch.numbers[: batch.rows] for batch in batches]) % 2
    z = np.concatenate([_host_blocks(forward, batch) for batch in batches])
    pilots: list[list[tuple[np.ndarray, ...]]] = [[], []]
    for level in zip(*start_levels(forward.schedule)):
        squared, x0 = [], []
        for batch in batches:
            levels = Levels(*(np.full(batch.z.shape[:2], x) for x in level))
            errors = forward.errors(batch, _PILOT_DRAW, levels, zero_context_timestep=True)
            squared.append(errors.squared)
            x0.append(partitioning.to_host(errors.x0, forward.mesh)[: batch.rows])
        for i in (0, 1):
            squares, estimates = (np.concatenate(x)[odd == i] for x in (squared, x0))
            mixture = _fit_mixture(z[odd == i], estimates, forward.discrete)
            means = (np.array(2 * np.log(level[1] / level[2])), squares.mean(), np.sqrt(np.mean(squares**2)))
            pilots[1 - i].append((*means, *mixture))
    return [Pilot(*(np.stack(x) for x in zip(*rows))) for rows in pilots]


def _fit_mixture(z: np.ndarray, x0: np.ndarray, discrete: bool) -> tuple[np.ndarray, ...]:
    """Fits the weights of the decoder's Gaussians by expectation maximization.

    Returns:
      The mean nats of a block, and the deviations and weights (S,).
    """
    chosen = np.random.default_rng(SEED).integers(z.size, size=VALUES)
    values, means = (x.reshape(-1, 1)[chosen].astype(np.float32) for x in (z, x0))
    deviations = np.maximum(np.sqrt(np.mean((values - means) ** 2)) * np.array(FACTORS), MIN_DEVIATION)
    nats = np.asarray(_nats_of_values(values, means, deviations.astype(np.float32), discrete), np.float64)
    least = nats.min(axis=1, keepdims=True)
    densities, weights = np.exp(least - nats), np.full(len(FACTORS), 1 / len(FACTORS))
    for _ in range(ITERATIONS):
        weights = weights * (densities.T @ (1 / (densities @ weights))) / len(densities)
    weights = (1 - _UNIFORM_WEIGHT) * weights + _UNIFORM_WEIGHT / len(FACTORS)
    mean = np.mean(least[:, 0] - np.log(densities @ weights))
    return mean * z[0, 0].size, deviations, weights


_nats_of_values = jax.jit(decoder_nats, static_argnums=3)


def _host_blocks(forward: TeacherForcing, batch: HeldOutBatch) -> np.ndarray:
    """Returns blocks in the order of generation on the host, float64 (rows, L, positions, C)."""
    blocks = partitioning.to_host(block_order.to_generation_order(batch.z, batch.order), forward.mesh)
    return np.asarray(blocks[: batch.rows], np.float64)


def integral_bound(schedule: Schedule, pilot: Pilot, starts: Sequence[int]) -> Bound:
    """Returns the bound with the integral over the SNR (module docstring)."""
    snr = np.exp(pilot.log_snr)
    terms = 0.5 * (snr[:-1] - snr[1:]) * (pilot.squared[:-1] + pilot.squared[1:]) / 2
    start, nats = _choose(pilot.decoder + _sum_after(terms), starts)
    edges = np.linspace(pilot.log_snr[start], _log_snr(_levels(schedule, np.array([float(MAX_TIMESTEP)])))[0], BINS + 1)
    centers, width = (edges[:-1] + edges[1:]) / 2, edges[0] - edges[1]
    share = _mix_uniform(np.exp(centers) * _interpolate(pilot, pilot.size, centers))

    def sample(u: np.ndarray) -> tuple[Levels, np.ndarray]:
        position = _invert(share, u)
        levels = levels_at(schedule, edges[0] - width * position)
        return levels, 0.5 * (levels.alpha / levels.sigma) ** 2 * width / share[position.astype(int)]

    first = levels_at(schedule, edges[:1])
    return Bound(Levels(*(x.item() for x in first)), pilot.deviations[start], pilot.weights[start], nats, sample)


def sum_bound(schedule: Schedule, pilot: Pilot, starts: Sequence[int]) -> Bound:
    """Returns the bound with the sum over integer timesteps (module docstring). Starts are the nearest integer timesteps."""
    table = Levels(np.arange(MAX_TIMESTEP + 1.0), *schedule.alpha_sigma(np.arange(MAX_TIMESTEP + 1)))
    log_snr = _log_snr(table)
    step_weights = 0.5 * -np.diff(np.exp(log_snr))  # of t = 1 to 999
    first = np.argmin(np.abs(log_snr - pilot.log_snr[:, None]), axis=1)
    after = _sum_after(step_weights * _interpolate(pilot, pilot.squared, log_snr[1:]))
    start, nats = _choose(pilot.decoder + after[first], starts)
    begin = first[start]
    weights, levels = step_weights[begin:], Levels(*(x[begin + 1 :] for x in table))
    share = _mix_uniform(weights * _interpolate(pilot, pilot.size, log_snr[begin + 1 :]))

    def sample(u: np.ndarray) -> tuple[Levels, np.ndarray]:
        step = _invert(share, u).astype(int)
        return Levels(*(x[step] for x in levels)), weights[step] / share[step]

    first_levels = Levels(*(x[begin].item() for x in table))
    return Bound(first_levels, pilot.deviations[start], pilot.weights[start], nats, sample)


def _choose(nats: np.ndarray, starts: Sequence[int]) -> tuple[int, float]:
    """Returns the index of the start with the least nats (K,), and these nats."""
    start = min(starts, key=np.nan_to_num(nats, nan=np.inf).__getitem__)
    return start, nats[start]


def _sum_after(terms: np.ndarray) -> np.ndarray:
    """Returns the sums (n + 1,) of all terms (n,) from an index on; the last is 0."""
    return np.append(np.cumsum(terms[::-1])[::-1], 0)


def _interpolate(pilot: Pilot, values: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """Interpolates values (K,) of the pilot; both axes are logarithmic."""
    logs = np.log(np.maximum(values, np.finfo(float).tiny))
    return np.exp(np.interp(-log_snr, -pilot.log_snr, logs))


def start_levels(schedule: Schedule) -> Levels:
    """Returns the noise levels (K,) with the ratios RATIOS; ratios above that of t = 0 have the level of t = 0."""
    log_snr = np.minimum(2 * np.log(RATIOS), _log_snr(_levels(schedule, np.zeros(1))))
    return levels_at(schedule, log_snr)


def levels_at(schedule: Schedule, log_snr: np.ndarray) -> Levels:
    """Returns the noise levels with a log of the SNR, by bisection."""
    low, high = np.zeros(log_snr.shape), np.full(log_snr.shape, float(MAX_TIMESTEP))
    for _ in range(50):
        middle = (low + high) / 2
        above = _log_snr(_levels(schedule, middle)) > log_snr
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return _levels(schedule, (low + high) / 2)


def _log_snr(levels: Levels) -> np.ndarray:
    out: np.ndarray = 2 * np.log(levels.alpha / levels.sigma)
    return out


def _levels(schedule: Schedule, t: np.ndarray) -> Levels:
    """Returns the noise levels at timesteps, also between the integer timesteps of DDPM."""
    if not has_whole_timesteps(schedule):
        return Levels(t, *schedule.alpha_sigma(t))
    alpha, sigma = schedule.alpha_sigma(np.arange(MAX_TIMESTEP + 1))
    log_snr = np.interp(t, np.arange(MAX_TIMESTEP + 1), 2 * np.log(alpha / sigma))
    return Levels(t, 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr)))


def _mix_uniform(sizes: np.ndarray) -> np.ndarray:
    """Returns probabilities proportional to sizes, mixed with the uniform distribution."""
    total = sizes.sum()
    shares = sizes / total if np.isfinite(total) and total > 0 else np.full(len(sizes), 1 / len(sizes))
    return (1 - _UNIFORM_SHARE) * shares + _UNIFORM_SHARE / len(sizes)


def _invert(shares: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Inverts a piecewise linear distribution function: returns positions in [0, number of shares)."""
    bounds = np.concatenate([[0], np.cumsum(shares)])
    position: np.ndarray = np.interp(u, bounds / bounds[-1], np.arange(len(bounds)))
    return position.clip(max=np.nextafter(len(shares), 0))
