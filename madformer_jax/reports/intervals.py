"""Means over seeds with 95 % intervals: of one mean, of the rows of a table, and of the points of a curve.

`estimate` is Student's interval of one mean. `holm` and `max_t` correct for several comparisons, so that
at most 5 % of tables or curves without any difference show an interval that excludes 0.
tests/reports/test_intervals.py checks that by simulation.

Three to eight seeds are too few for a bootstrap of the seeds: three have ten distinct resamples, and
their sign changes cannot reach p < 0.25. All intervals here therefore assume normal means over seeds.
"""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05
_DRAWS = 20_000  # simulated curves of `max_t`


class Estimate(NamedTuple):
    """A mean over seeds with an interval. A single seed has no interval."""

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 if the interval lies above 0, -1 if it lies below, 0 if it includes 0 or does not exist."""
        return 0 if self.low is None or self.high is None else (self.low > 0) - (self.high < 0)


def estimate(values: Iterable[float], alpha: float = ALPHA) -> Estimate:
    """Returns the mean of n values with Student's interval: mean +- t(1 - alpha / 2, n - 1) s / sqrt(n)."""
    x = tuple(values)
    mean = math.fsum(x) / len(x)
    if len(x) == 1:
        return Estimate(x, mean, None, None)
    half = _t_quantile(len(x) - 1, alpha) * statistics.stdev(x) / math.sqrt(len(x))
    return Estimate(x, mean, mean - half, mean + half)


def holm(samples: Sequence[Sequence[float]]) -> list[Estimate]:
    """Returns the mean of each sample with the interval of Holm's procedure.

    The samples are the differences in the cells of a table. The k-th smallest of m p-values (k from 0)
    belongs to an interval of level 1 - 0.05 / (m - k). From the first interval that includes 0 on, the
    level stays. So an interval excludes 0 exactly where Holm's step-down test rejects, whose chance of
    any false rejection in the table is at most 5 %, however the samples depend on each other.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.

    Args:
      samples: The values of the seeds for each cell. Cells with a single value get no interval.
    """
    order = sorted((i for i, x in enumerate(samples) if len(x) > 1), key=lambda i: _p_value(samples[i]))
    result = [estimate(x) for x in samples]
    remaining, stopped = len(order), False
    for i in order:
        result[i] = estimate(samples[i], ALPHA / remaining)
        stopped = stopped or not result[i].sign
        remaining -= not stopped
    return result


def max_t(samples: Sequence[Sequence[float]], tests: int = 1) -> list[Estimate]:
    """Returns the means of the points of a curve with a simultaneous band.

    The band is mean +- c s / sqrt(n) at each point, with the same c: the quantile of the largest |t| over
    the curve. Normal data with the correlation of the points simulate it. With few seeds the sample
    correlation is too high, so it is shrunk towards independence by the estimated optimal weight; c stays
    between Student's quantile and that of Bonferroni.

    Sources: T. Hothorn, F. Bretz and P. Westfall, Simultaneous inference in general parametric models,
    Biometrical J. 50, 2008, for the band; J. Schäfer and K. Strimmer, A shrinkage approach to large-scale
    covariance matrix estimation, Stat. Appl. Genet. Mol. Biol. 4, 2005, for the correlation.

    Args:
      samples: The values of the same seeds at each point.
      tests: Number of curves that are compared side by side. Each gets the level 1 - 0.05 / tests.
    """
    x = np.asarray(samples, np.float64).T
    seeds, points = x.shape
    if seeds == 1:
        return [estimate(point) for point in samples]
    alpha = ALPHA / tests
    c = float(np.quantile(_largest_t(_shrunk_correlation(x), seeds), 1 - alpha))
    c = min(max(c, _t_quantile(seeds - 1, alpha)), _t_quantile(seeds - 1, alpha / points))
    halves = c * x.std(0, ddof=1) / math.sqrt(seeds)
    return [
        Estimate(tuple(map(float, point)), mean := math.fsum(point) / seeds, float(mean - half), float(mean + half))
        for point, half in zip(samples, halves)
    ]


@functools.cache
def _normal_draws(seeds: int, points: int) -> np.ndarray:
    # `RandomState` promises the same numbers in every version of numpy.
    return np.random.RandomState(0).standard_normal((_DRAWS, seeds, points))


def _largest_t(correlation: np.ndarray, seeds: int) -> np.ndarray:
    """Returns draws of the largest |t| over the points, without differences, (draws,)."""
    z = _normal_draws(seeds, len(correlation)) @ np.linalg.cholesky(correlation).T
    return np.max(np.abs(z.mean(1)) / (z.std(1, ddof=1) / math.sqrt(seeds)), 1)


def _shrunk_correlation(x: np.ndarray) -> np.ndarray:
    """Returns the correlation (points, points) of x (seeds, points), shrunk towards the identity."""
    n, points = x.shape
    centered = x - x.mean(0)
    centered -= centered.mean(0)  # what rounding leaves, if the seeds hardly differ
    deviation = centered.std(0, ddof=1)
    z = np.divide(centered, deviation, out=np.zeros_like(centered), where=deviation > 0)
    products = z[:, :, None] * z[:, None, :]
    r = products.sum(0) / (n - 1)
    variance = n / (n - 1) ** 3 * np.sum((products - products.mean(0)) ** 2, 0)
    off = ~np.eye(points, dtype=bool)
    total = float(np.sum(r[off] ** 2))
    weight = min(1.0, float(np.sum(variance[off])) / total) if total else 1.0
    return np.where(off, (1 - weight) * r, 1.0) + 1e-9 * np.eye(points)


def _p_value(x: Sequence[float]) -> float:
    """Returns the two-sided p-value of Student's test that the mean is 0."""
    from scipy import special  # the import takes a second

    mean, error = math.fsum(x) / len(x), statistics.stdev(x) / math.sqrt(len(x))
    if not error:
        return float(not mean)
    return float(2 * special.stdtr(len(x) - 1, -abs(mean) / error))


@functools.cache
def _t_quantile(degrees_of_freedom: int, alpha: float) -> float:
    """Returns the 1 - alpha / 2 quantile of Student's t distribution."""
    from scipy import special  # the import takes a second

    return float(special.stdtrit(degrees_of_freedom, 1 - alpha / 2))
