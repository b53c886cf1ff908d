"""Scores against torch-fidelity 0.4.0, and on arrays with a known answer."""

import json

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import scores
from madformer_jax.evaluation.scores import Gaussian


def precision_recall(generated, real, k=3):
    return tuple(inside.mean() for inside in scores.inside_balls(generated, real, k))


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize("case", ["full", "low_rank"])
def test_scores_equal_torch_fidelity(reference, case):
    arrays = reference("metrics.npz")
    generated, real, logits = (arrays[f"{case}/{name}"] for name in ("generated", "real", "logits"))
    expected = json.loads(str(arrays[f"{case}/values"]))
    kid = scores.kernel_distance(generated, real, subset_size=expected["kid_subset_size"])
    isc = scores.inception_score(logits)
    precision, recall = precision_recall(generated, real)
    distance = expected["frechet_inception_distance"]
    assert scores.frechet(generated, real) == pytest.approx(
        distance, rel=1e-7
    )  # torch-fidelity computes the mean in float32
    assert kid == pytest.approx([expected[f"kernel_inception_distance_{x}"] for x in ("mean", "std")], rel=5e-6)
    assert isc == pytest.approx([expected[f"inception_score_{x}"] for x in ("mean", "std")], rel=1e-10)
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-7)


@pytest.mark.parametrize("n1, n2, d", [(40, 30, 7), (7, 30, 12), (2, 3, 4), (30, 20, 1), (9, 9, 9)])
def test_distance_of_features_is_that_of_their_statistics(random, n1, n2, d):
    x, y = random.standard_normal((n1, d)) * 3 + 5, random.standard_normal((n2, d))
    s1, s2 = (np.cov(z, rowvar=False).reshape(d, d) for z in (x, y))
    # Eigenvalues of the product are exact only to the square root of float64's precision.
    cross = np.sqrt(np.maximum(np.linalg.eigvals(s1 @ s2).real, 0)).sum()
    means = np.sum((x.mean(0) - y.mean(0)) ** 2)
    expected = means + np.trace(s1) + np.trace(s2) - 2 * cross
    assert scores.frechet(x, y) == pytest.approx(expected, rel=1e-6)
    stored = Gaussian.from_covariance(y.mean(0), s2)
    assert scores.frechet(x, stored) == pytest.approx(scores.frechet(x, y), rel=1e-6)


def test_identical_sets(random):
    x = random.standard_normal((30, 8)).astype(np.float32)
    assert scores.frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert precision_recall(x, x) == (1, 1)
    shuffled = random.permutation(x)
    assert precision_recall(x, shuffled) == (1, 1)
    wide = random.standard_normal((30, 300))
    one = np.repeat(wide[:1], 7, axis=0)
    assert precision_recall(one, np.tile(wide, (5, 1))) == (1, 1 / 30)  # balls of radius 0
    assert scores.kernel_distance(x, shuffled, subsets=3)[0] < 0  # unbiased: below 0 for copies


def test_subsets_are_no_larger_than_the_smaller_set(random):
    x, y = random.standard_normal((12, 4)), random.standard_normal((9, 4))
    assert scores.kernel_distance(x, y) == scores.kernel_distance(x, y, subset_size=9)
    whole = scores.kernel_distance(y, y[::-1] + 1)

    def rule(a, b):
        k = lambda s, t: (s @ t.T / 4 + 1) ** 3  # noqa: E731
        off = ~np.eye(9, dtype=bool)
        return k(a, a)[off].mean() + k(b, b)[off].mean() - 2 * k(a, b).mean()

    assert whole == pytest.approx((rule(y, y + 1), 0), abs=1e-9)


def test_kernel_values_that_serve_all_subsets_give_the_distances_of_the_subsets(random, monkeypatch):
    x, y = random.standard_normal((30, 4)), random.standard_normal((23, 4)) + 0.5
    monkeypatch.setattr(scores, "TILE_ROWS", 8)
    reused = scores.kernel_distance(x, y, subset_size=7)
    monkeypatch.setattr(scores, "MAX_REUSE", 0)
    assert reused == pytest.approx(scores.kernel_distance(x, y, subset_size=7), rel=1e-12)
    assert reused[1] > 0


def test_balls_include_their_border_and_not_their_center():
    real = np.array([[0.0], [1], [2], [3], [1000]])  # radii to the second neighbor: 2, 1, 1, 2, 998
    generated = np.array([[-2.0], [-2.1], [5], [5.1], [2000], [0]])
    precision, recall = precision_recall(generated, real, k=2)
    assert precision == 4 / 6  # -2.1 and 2000 are outside; 5.1 is in the ball of 1000
    assert recall == 1  # 2000's ball reaches to 5
    far = generated[:, [0, 0]] * [1, 0] + 1e5
    assert precision_recall(far, real[:, [0, 0]] * [1, 0] + 1e5, k=2) == (precision, recall)


def test_tiles_do_not_change_precision_and_recall(random, monkeypatch):
    x, y = random.standard_normal((50, 6)), random.standard_normal((41, 6)) * 0.8
    y[:5] = x[:5]  # copies: ties at the borders
    whole = scores.inside_balls(x, y)
    distance = np.linalg.norm(x[:, None] - y, axis=2)
    radius = [np.sort(np.linalg.norm(z[:, None] - z, axis=2), axis=1)[:, 3] for z in (x, y)]
    np.testing.assert_array_equal(whole[0], (distance <= radius[1] + 1e-12).any(axis=1))
    np.testing.assert_array_equal(whole[1], (distance <= radius[0][:, None] + 1e-12).any(axis=0))
    monkeypatch.setattr(scores, "TILE_ROWS", 7)
    for a, b in zip(whole, scores.inside_balls(x, y)):
        np.testing.assert_array_equal(a, b)
    assert scores.frechet(x, y) == pytest.approx(scores.frechet(x.astype(np.float32), y), rel=1e-5)


def test_inception_score_of_confident_and_of_equal_logits():
    confident = (
        np.eye(5)[np.arange(1000) % 5] * 2000
    )  # The exponential overflows, and the probabilities of other classes underflow.
    assert scores.inception_score(confident, splits=1) == pytest.approx((5, 0))
    assert scores.inception_score(np.zeros((20, 7))) == pytest.approx((1, 0))


def _nan(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x)


X = np.arange(24.0).reshape(6, 4) ** 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scores.frechet(X[:1], X), "1 generated images are too few for a covariance"),
        (lambda: scores.frechet(X, X[:1]), "1 real images"),
        (lambda: scores.frechet(X, _nan(X)), "real features of 1 of 6 images are not finite"),
        (lambda: scores.frechet(X, X[:, :3]), "4 features, real ones 3"),
        (lambda: scores.frechet(X[0], X), r"shape \(4,\)"),
        (lambda: scores.kernel_distance(_nan(X), X), "not finite"),
        (lambda: scores.kernel_distance(X, X[:1]), "kernel distance"),
        (lambda: scores.kernel_distance(X, X, subset_size=1), "subsets of 1"),
        (lambda: scores.inception_score(X), "10 splits"),
        (lambda: scores.inception_score(_nan(X), splits=2), "not finite"),
        (lambda: precision_recall(X[:3], X), "3-th neighbor: give 4"),
        (lambda: precision_recall(X, _nan(X)), "not finite"),
        (lambda: Gaussian.from_covariance(X[0], X), "do not fit"),
        (lambda: Gaussian.from_covariance(X[0], -np.eye(4)), "not a covariance"),
        (lambda: Gaussian.from_covariance(X[0], np.triu(np.ones((4, 4)))), "not a covariance"),
        (lambda: Gaussian.from_covariance(X[0], np.full((4, 4), np.inf)), "not finite"),
    ],
)
def test_errors_of_bad_features_have_one_line(call, message):
    with pytest.raises(ConfigError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_distance_of_gaussians_with_a_known_answer(random):
    mean, scale = random.standard_normal(5), random.random(5)
    covariance = np.diag(scale**2)
    rotation = np.linalg.qr(random.standard_normal((5, 5)))[0]
    a = Gaussian.from_covariance(rotation @ mean, rotation @ covariance @ rotation.T)
    b = Gaussian.from_covariance(np.zeros(5), rotation @ (9 * covariance) @ rotation.T)
    assert scores.frechet(a, b) == pytest.approx(np.sum(mean**2) + np.sum((2 * scale) ** 2), rel=1e-10)
