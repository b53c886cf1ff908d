"""Bootstrap replicates by weights against scores of explicitly repeated images."""

import numpy as np
import pytest

from madformer_jax.evaluation import bootstrap, scores


@pytest.fixture
def random():
    return np.random.default_rng(1)


def _repeated(x, counts):
    return np.repeat(x, counts.astype(int), axis=0)


def test_replicates_of_a_mean_and_of_the_inception_score(random):
    values, logits = random.random(30), random.standard_normal((30, 4)) * 2
    counts = bootstrap.resample_counts(30, replicates=8)
    assert counts.shape == (8, 30) and (counts.sum(axis=1) == 30).all()
    expected = [_repeated(values, row).mean() for row in counts]
    np.testing.assert_allclose(bootstrap.mean_replicates(values, counts), expected)
    expected = [scores.inception_score(_repeated(logits, row), splits=1)[0] for row in counts]
    np.testing.assert_allclose(bootstrap.inception_replicates(logits, counts, splits=1), expected)
    ones = np.ones((1, 30))
    for splits in (1, 3):
        score = scores.inception_score(logits, splits)[0]
        np.testing.assert_allclose(bootstrap.inception_replicates(logits, ones, splits), score)


def test_replicates_of_the_kernel_distance_leave_out_repetitions(random, monkeypatch):
    x, y = random.standard_normal((25, 6)), random.standard_normal((17, 6))
    monkeypatch.setattr(scores, "TILE_ROWS", 8)
    counts = bootstrap.resample_counts(25, replicates=3)
    real_counts = bootstrap.resample_counts(17, replicates=3, seed=1)
    expected = []
    for row, real_row in zip(counts, real_counts):
        i, j = (np.repeat(np.arange(len(a)), a.astype(int)) for a in (row, real_row))
        within = sum(scores.kernel(z[k], z[k])[k[:, None] != k].mean() for z, k in ((x, i), (y, j)))
        expected.append(within - 2 * scores.kernel(x[i], y[j]).mean())
    np.testing.assert_allclose(scores.weighted_kernel_distances(x, y, counts, real_counts), expected)


def test_kernel_intervals_cover_the_truth_over_fresh_pairs_of_sets(random):
    """The true distance of equal distributions is 0; both sets are as small as a subset."""
    covered = 0
    for _ in range(40):
        x, y = random.standard_normal((2, 60, 4))
        value = scores.kernel_distance(x, y)[0]
        counts, real_counts = (bootstrap.resample_counts(60, 100, seed) for seed in (0, 1))
        low, high = bootstrap.interval(value, scores.weighted_kernel_distances(x, y, counts, real_counts))
        covered += low <= 0 <= high
    assert covered >= 34


@pytest.mark.parametrize("n", [10, 300])
def test_intervals_of_shares_are_inside_and_cover_the_truth(n):
    """The mean coverage over shares is close to 95 %, by summation over all outcomes."""
    k = np.arange(n + 1)
    low, high = np.transpose([bootstrap.wilson(x, n) for x in k.tolist()])
    assert (low >= 0).all() and (high <= 1).all() and (low <= k / n).all() and (k / n <= high).all()
    assert high[0] > 0 and low[n] < 1  # 0 of n is not certain
    log_choose = np.cumsum(np.r_[0, np.log(np.arange(n, 0, -1) / np.arange(1, n + 1))])
    shares = np.linspace(0.02, 0.98, 97)[:, None]
    p = np.exp(log_choose + k * np.log(shares) + (n - k) * np.log(1 - shares))
    coverage = np.sum(p * ((low <= shares) & (shares <= high)), axis=1)
    assert 0.94 < coverage.mean() < 0.965 and coverage.min() > 0.8


@pytest.mark.parametrize("n, d", [(400, 12), (60, 90)])
def test_spread_of_the_frechet_distance_is_that_over_fresh_sets(random, n, d):
    scale = np.arange(1, d + 1) ** -0.5
    real = scores.Gaussian(np.zeros(d), np.diag(scale))

    def fresh():
        return random.standard_normal((n, d)) * scale * 1.1 + 0.1

    truth = np.std([scores.frechet(fresh(), real) for _ in range(60)])
    spreads = [np.std(bootstrap.frechet_replicates(fresh(), real, bootstrap.resample_counts(n))) for _ in range(3)]
    assert 0.75 * truth < np.mean(spreads) < 1.4 * truth


def test_replicates_of_a_single_feature_are_exact(random):
    x, y = random.standard_normal((20, 1)) * 2 + 1, random.standard_normal((30, 1))
    counts = bootstrap.resample_counts(20, replicates=5)
    expected = [scores.frechet(_repeated(x, row), y) - np.var(y, ddof=1) for row in counts]
    np.testing.assert_allclose(bootstrap.frechet_replicates(x, y, counts), expected)


def test_unchanged_weights_give_the_distance_itself(random):
    for n, d in ((40, 6), (9, 20)):
        x, y = random.standard_normal((n, d)), random.standard_normal((30, d)) + 0.2
        total = np.sum(scores.Gaussian.from_features(y).root ** 2)
        replicate = bootstrap.frechet_replicates(x, y, np.ones((1, n)))
        np.testing.assert_allclose(replicate + total, scores.frechet(x, y), rtol=1e-6)


def test_interval_lies_around_the_score():
    replicates = np.arange(201.0)  # biased: their mean is 100
    assert bootstrap.interval(7, replicates) == pytest.approx((7 - 95, 7 + 95))
