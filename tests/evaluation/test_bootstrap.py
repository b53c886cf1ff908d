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
    index = [np.repeat(np.arange(25), row.astype(int)) for row in counts]
    expected = [scores.kernel(x[i], x[i])[i[:, None] != i].mean() - 2 * scores.kernel(x[i], y).mean() for i in index]
    np.testing.assert_allclose(bootstrap.kernel_replicates(x, y, counts), expected)


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
