"""Bits per dimension: a variational bound on -log2 p(image), divided by the number of values of the image.

The bound is a sum over blocks, each conditioned on the true blocks before it (teacher forcing). Models of
any number of blocks therefore bound the same quantity. With SNR = alpha^2 / sigma^2 and the clean estimate x of the model,
the bound of a block z is, in nats (Kingma et al., arXiv 2107.00630, equations 11 to 15):

    prior      KL(q(z_999 | z) || N(0, I))
    diffusion  1/2 times the integral of E |z - x(z_t, t)|^2 d SNR(t), from SNR(999) to SNR(first)
    decoder    E -log p(z | z_first), with p a Gaussian around x of deviation sigma / alpha

The first timestep is where alpha / sigma is 100, or 0 if the path begins below that, as DDPM's does at
99.995. All paths therefore share the decoder and the limit of the integral. On 8-bit pixels p is the
probability of the pixel's bin. On other latents p is a density, and the bound is that of the latents.

A path of whole timesteps (DDPM) has two bounds. `bits_per_dimension` is the integral, as on every path: the
log of the SNR is linear between whole timesteps, and the network reads the timesteps between them.
`bits_per_dimension_discrete` is the sum over 999 steps of 1/2 (SNR(t - 1) - SNR(t)) E |z - x(z_t, t)|^2, the
bound of the `ancestral` sampler with 1,000 steps and the variance of q(z_(t-1) | z_t, z) (Ho et al., arXiv
2006.11239). It is looser, because its first steps are coarse.

Timesteps are drawn by importance: a pilot over 64 images measures the integrand in 32 bins of the log of the
SNR, and the density is proportional to its root mean square. The pilot has noise of its own, so the
estimate is unbiased.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from madformer_jax.diffusion.schedule import MAX_TIMESTEP, Schedule
from madformer_jax.evaluation.held_out_images import HeldOutBatch
from madformer_jax.evaluation.held_out_losses import has_whole_timesteps, low_discrepancy
from madformer_jax.evaluation.teacher_forcing import Levels, TeacherForcing
from madformer_jax.runtime import partitioning

MAX_RATIO = 100.0  # alpha / sigma at the first timestep, at most
DRAWS = 4  # timesteps of each image and block
PILOT_IMAGES, PILOT_DRAWS, BINS = 64, 4, 32
_UNIFORM_SHARE = 0.1  # of the density, so that no weight is large
# First draws of noise and streams of timesteps. Losses use those from 0 on.
_DECODER_DRAW, _PILOT_DRAW, _INTEGRAL_DRAW, _SUM_DRAW = 100, 200, 300, 400
SETTINGS = {"ratio": MAX_RATIO, "draws": DRAWS, "pilot": [PILOT_IMAGES, PILOT_DRAWS, BINS], "version": 1}

Batches = Callable[[int | None], Iterable[HeldOutBatch]]  # first n images, or all


def measure(forward: TeacherForcing, batches: Batches) -> dict[str, np.ndarray]:
    """Measures the bound of each image.

    Args:
      forward: The model.
      batches: Returns batches of the first images.

    Returns:
      `bits_per_dimension` (n,) and, for a path of whole timesteps, `bits_per_dimension_discrete` (n,);
      `blocks_bits` (n, L), the bound of each block in bits per dimension of the block.
    """
    times = ImportanceTimes(forward.schedule, _pilot(forward, batches(PILOT_IMAGES)))
    rows = [measure_batch(forward, batch, times) for batch in batches(None)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def measure_batch(forward: TeacherForcing, batch: HeldOutBatch, times: "ImportanceTimes") -> dict[str, np.ndarray]:
    """Measures the bound of each image of a batch, see `measure`."""
    end_levels = path_ends(forward.schedule)
    z = partitioning.to_host(batch.z, forward.mesh).astype(np.float64)
    dimensions = z.shape[2] * z.shape[3]
    first = Levels(*(np.full(z.shape[:2], x) for x in end_levels[0]))
    alpha, variance = end_levels[1].alpha, end_levels[1].sigma ** 2
    prior = 0.5 * np.sum(alpha**2 * z**2 + variance - 1 - np.log(variance), axis=(2, 3))[: batch.rows]
    decoder = forward.errors(batch, _DECODER_DRAW, first, clean_blocks=True).decoder
    prior_and_decoder = prior + decoder

    def bits(draw: int, sample: Callable[[np.ndarray], tuple[Levels, np.ndarray]]) -> np.ndarray:
        return (prior_and_decoder + _mean_error(forward, batch, draw, DRAWS, sample)) / (dimensions * np.log(2))

    by_block = bits(_INTEGRAL_DRAW, times.of_integral)
    out = {"bits_per_dimension": by_block.mean(axis=1), "blocks_bits": by_block}
    if times.has_sum:
        out["bits_per_dimension_discrete"] = bits(_SUM_DRAW, times.of_sum).mean(axis=1)
    return out


def _mean_error(
    forward: TeacherForcing,
    batch: HeldOutBatch,
    first_draw: int,
    draws: int,
    sample: Callable[[np.ndarray], tuple[Levels, np.ndarray]],
) -> np.ndarray:
    """Returns the diffusion term of each block in nats (n, L), a mean over draws."""
    return np.mean([terms for terms, _ in weighted_errors(forward, batch, first_draw, draws, sample)], axis=0)


def weighted_errors(
    forward: TeacherForcing,
    batch: HeldOutBatch,
    first_draw: int,
    draws: int,
    sample: Callable[[np.ndarray], tuple[Levels, np.ndarray]],
) -> Iterable[tuple[np.ndarray, Levels]]:
    """Yields the weighted squared errors (n, L) of each draw and their noise levels.

    Args:
      forward: The model.
      batch: The images.
      first_draw: First draw of noise, which is also the stream of the timesteps.
      draws: Number of draws.
      sample: Maps uniform numbers (n, L) to noise levels and weights.
    """
    for k in range(draws):
        numbers = batch.numbers.astype(np.int64) * draws + k
        levels, weights = sample(low_discrepancy(numbers, forward.sizes.blocks, first_draw))
        squared = forward.errors(batch, first_draw + k, levels, clean_blocks=True).squared
        yield weights[: batch.rows] * squared, Levels(*(x[: batch.rows] for x in levels))


def _pilot(forward: TeacherForcing, batches: Iterable[HeldOutBatch]) -> np.ndarray:
    """Returns the root mean square of the integrand in each bin of the log of the SNR, up to a factor (BINS,)."""
    times = ImportanceTimes(forward.schedule, np.ones(BINS))
    sums, counts = np.zeros(BINS), np.zeros(BINS)
    for batch in batches:
        for values, levels in weighted_errors(forward, batch, _PILOT_DRAW, PILOT_DRAWS, times.of_integral):
            bins = times.bin_of(2 * np.log(levels.alpha / levels.sigma))
            np.add.at(sums, bins, values**2)
            np.add.at(counts, bins, 1)
    measured = counts > 0
    return np.sqrt(np.interp(np.arange(BINS), np.flatnonzero(measured), sums[measured] / counts[measured]))


class ImportanceTimes:
    """Timesteps drawn by importance, and their weights.

    Attributes:
      has_sum: Whether the path has whole timesteps, and so the sum over steps.
    """

    def __init__(self, schedule: Schedule, integrand: Sequence[float] | np.ndarray):
        """Computes the densities.

        Args:
          schedule: The noise path.
          integrand: Size of the integrand in each of equal bins of the log of the SNR, from little to much
            noise.
        """
        self._schedule = schedule
        self._high, self._low = (2 * np.log(end.alpha / end.sigma).item() for end in path_ends(schedule))
        self._size = np.asarray(integrand, np.float64)
        self._share = _mix_uniform(self._size)
        self.has_sum = has_whole_timesteps(schedule)
        if self.has_sum:
            alpha, sigma = schedule.alpha_sigma(np.arange(MAX_TIMESTEP + 1))
            self._table = Levels(np.arange(MAX_TIMESTEP + 1.0), alpha, sigma)
            snr = (alpha / sigma) ** 2
            self._step_weights = 0.5 * (snr[:-1] - snr[1:])  # of t = 1 to 999
            bins = self.bin_of(np.log(snr[1:]))
            self._step_share = _mix_uniform(self._step_weights / snr[1:] * self._size[bins])

    def bin_of(self, log_snr: np.ndarray) -> np.ndarray:
        """Returns the bin of a log of the SNR."""
        bins = len(self._size)
        return ((self._high - log_snr) / (self._high - self._low) * bins).astype(int).clip(0, bins - 1)

    def of_integral(self, u: np.ndarray) -> tuple[Levels, np.ndarray]:
        """Returns the noise levels of uniform numbers in [0, 1), and their weights in the integral."""
        position, width = _invert(self._share, u), (self._high - self._low) / len(self._size)
        bins = position.astype(int)
        log_snr = self._high - width * position
        levels = levels_at(self._schedule, log_snr)
        return levels, 0.5 * (levels.alpha / levels.sigma) ** 2 * width / self._share[bins]

    def of_sum(self, u: np.ndarray) -> tuple[Levels, np.ndarray]:
        """Returns the noise levels of uniform numbers in [0, 1), and their weights in the sum over steps."""
        step = _invert(self._step_share, u).astype(int)
        levels = Levels(*(x[1 + step] for x in self._table))
        return levels, self._step_weights[step] / self._step_share[step]


def path_ends(schedule: Schedule) -> tuple[Levels, Levels]:
    """Returns the noise levels, each of shape (1,), of the first and the last timestep of the bound."""
    first, last = (_levels(schedule, np.array([t])) for t in (0.0, float(MAX_TIMESTEP)))
    if first.alpha > MAX_RATIO * first.sigma:
        first = levels_at(schedule, np.array([2 * np.log(MAX_RATIO)]))
    return first, last


def levels_at(schedule: Schedule, log_snr: np.ndarray) -> Levels:
    """Returns the noise levels with a log of the SNR, by bisection."""
    low, high = np.zeros(log_snr.shape), np.full(log_snr.shape, float(MAX_TIMESTEP))
    for _ in range(50):
        middle = (low + high) / 2
        levels = _levels(schedule, middle)
        above = 2 * np.log(levels.alpha / levels.sigma) > log_snr
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return _levels(schedule, (low + high) / 2)


def _levels(schedule: Schedule, t: np.ndarray) -> Levels:
    """Returns the noise levels at timesteps, which may lie between the whole timesteps of DDPM."""
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
