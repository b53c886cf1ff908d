"""All scores of a set of images against the score functions, and tables of results."""

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import bootstrap, score_summary, scores, seams
from madformer_jax.evaluation.memorization import TrainingFeatures
from madformer_jax.evaluation.networks.classifier import ClassifierNetwork
from madformer_jax.evaluation.networks.inception import Inception
from madformer_jax.evaluation.reference_statistics import Reference


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    return {
        "features": random.standard_normal((40, 5)),
        "logits": random.standard_normal((40, 3)),
        "labels": random.integers(0, 3, 40),
        "profile": random.random((40, 7 + 11)),
    }


def _compute_scores(arrays, network=Inception, **settings):
    random = np.random.default_rng(1)
    real = random.standard_normal((30, 5)) + 0.3
    reference = Reference({"n": 30}, "", scores.Gaussian.from_features(real), real, random.random(18))
    settings = {"recognize": True, "grid": (2, 2), "shape": (8, 12), "seam_lines": 3} | settings
    return score_summary.compute_scores(network, arrays, reference, **settings), reference


def test_all_scores_have_their_name_their_value_and_an_interval(arrays):
    out, reference = _compute_scores(arrays, training=_training())
    x, y = arrays["features"], reference.features
    steps = seams.border_and_interior_differences(arrays["profile"], (8, 12), 2, 2)
    precision, recall = scores.inside_balls(x, y)
    expected = {
        "FID": scores.frechet(x, y),
        "KID": scores.kernel_distance(x, y)[0],
        "IS": scores.inception_score(arrays["logits"])[0],
        "precision": precision.mean(),
        "recall": recall.mean(),
        "recognised": np.mean(arrays["logits"].argmax(1) == arrays["labels"]),
        "seam": seams.seam_score(steps),
    }
    assert {name: score["value"] for name, score in out.items() if name in expected} == pytest.approx(expected)
    assert out.keys() - expected.keys() == {"memorisation", "memorized", "seam_difference"}
    assert out["KID"]["deviation"] == scores.kernel_distance(x, y)[1]
    assert out["seam"]["real"] == seams.seam_score(
        seams.border_and_interior_differences(reference.profile[None], (8, 12), 2, 2)
    )
    for score in out.values():
        assert score["low"] < score["value"] < score["high"]
    assert {name: out["memorized"][name] for name in ("low", "high")} == bootstrap.wilson(
        round(out["memorized"]["value"] * 40), 40
    )._asdict()


def _training():
    x, held_out = np.random.default_rng(2).standard_normal((2, 20, 5))
    return TrainingFeatures(Reference({"n": 20}, "", scores.Gaussian.from_features(x), x, None, stored=20), held_out)


def test_memorized_images_are_nearer_than_most_held_out_images(arrays):
    """Compares with the distances of all pairs. A tenth of the images are copies."""
    training = _training()
    x, held_out = np.random.default_rng(2).standard_normal((2, 20, 5))
    features = arrays["features"].copy()
    features[[3, 17, 22, 31]] = x[[5, 6, 5, 19]]
    out = _compute_scores(arrays | {"features": features}, training=training)[0]
    score = out["memorized"]
    distances = np.linalg.norm(features[:, None] - x, axis=2)
    threshold = np.percentile(np.linalg.norm(held_out[:, None] - x, axis=2).min(axis=1), 5)
    assert score["threshold"] == pytest.approx(threshold)
    assert score["value"] == np.mean(distances.min(axis=1) < threshold) >= 0.1
    assert [(i, j) for i, j, d in score["pairs"][:4]] == [(3, 5), (17, 6), (22, 5), (31, 19)]
    for i, j, distance in score["pairs"]:
        assert distance == pytest.approx(distances[i].min(), abs=1e-6) and j == distances[i].argmin()
    for name in ("memorisation", "memorized"):
        assert (out[name]["searched"], out[name]["training"]) == (20, 20)
    real = score_summary.memorization_scores(training, None)
    assert real["memorisation"]["value"] == 1 and real["memorized"]["value"] == 0.05


def test_seams_of_one_block_are_compared_with_real_images_on_common_lines():
    """The differences across lines at multiples of 4 pixels, by loops over pixels."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 1), dtype=np.uint8).astype(int)
    sums = np.zeros((3, 2, 2))  # image; line or not; sum, pairs
    for i, y, x in np.ndindex(3, 8, 12):
        for dy, dx, at in ((1, 0, y + 1), (0, 1, x + 1)):
            if y + dy < 8 and x + dx < 12:
                sums[i, int(at % 4 > 0)] += abs(images[i, y + dy, x + dx, 0] - images[i, y, x, 0]), 1
    profiles = seams.difference_profiles(images.astype(np.uint8))
    steps = seams.line_and_other_differences(profiles, (8, 12), 4)
    np.testing.assert_allclose(steps, sums[..., 0] / sums[..., 1], rtol=1e-5)
    random = np.random.default_rng(1)
    features = random.standard_normal((3, 5))
    arrays = {"features": random.standard_normal((12, 5)), "profile": np.tile(profiles, (4, 1))}
    arrays["labels"] = np.zeros(12, np.int32)
    reference = Reference({"n": 3}, "", scores.Gaussian.from_features(features), None, profiles[0])
    settings = {"recognize": False, "grid": (1, 1), "shape": (8, 12)}
    out = score_summary.compute_scores(Inception, arrays, reference, seam_lines=4, **settings)
    expected = seams.seam_score(steps) - seams.seam_score(steps[:1])
    assert out["seam_difference"]["value"] == pytest.approx(expected) and "seam" not in out
    assert out["seam_difference"]["low"] < expected < out["seam_difference"]["high"]
    assert "seam_difference" not in score_summary.compute_scores(
        Inception, arrays, reference, seam_lines=12, **settings
    )


@pytest.mark.parametrize(("across", "inside", "expected"), [(0, 0, 1), (2, 0, np.inf), (0, 2, 0)])
def test_seams_of_constant_images_have_an_interval(arrays, across, inside, expected):
    """The score of constant images is 1. With differences at borders only it is infinite."""
    border = np.concatenate([np.arange(1, side) % (side // 2) == 0 for side in (8, 12)])
    profile = np.tile(np.where(border, across, inside), (40, 1))
    seam = _compute_scores(arrays | {"profile": profile})[0]["seam"]
    assert [seam[name] for name in ("value", "low", "high")] == [expected] * 3
    profile[1:] = 0  # Some replicates contain constant images only, and some are infinite.
    seam = _compute_scores(arrays | {"profile": profile})[0]["seam"]
    assert seam["low"] <= seam["value"] <= seam["high"]


def test_blocks_of_one_pixel_have_no_seam_score(arrays):
    assert "seam" not in _compute_scores(arrays, grid=(8, 12))[0]


def test_a_set_without_a_readable_image_is_refused(arrays):
    with pytest.raises(ConfigError, match="0 generated images are too few"):
        _compute_scores({name: x[:0] for name, x in arrays.items()})


def test_scores_of_another_network_end_in_its_name(arrays):
    out, _ = _compute_scores(arrays, ClassifierNetwork, recognize=False, grid=(1, 1))
    names = [f"{name}-classifier" for name in ("FD", "KID", "IS", "precision", "recall")]
    assert list(out) == [*names, "seam_difference"]


def _result(value, **images):
    protocol = {"n": 10, "reference": "a", "network": {"weights": "w"}, "image": {}, "scores": {}, "images": images}
    return {"protocol": protocol, "scores": {"FID": {"value": value, "low": value - 1, "high": value + 1}}}


def test_table_shows_what_differs_and_the_mean_over_checkpoints():
    results = [_result(4.0, step=s, fingerprint=f"of {s}", steps=n, solver="ddim") for s in (1, 2) for n in (5, 10)]
    results[2]["scores"]["FID"]["value"] = 6.0
    lines = score_summary.comparison_table(results + score_summary.mean_over_checkpoints(results)).splitlines()
    assert lines[0] == "| step | steps | FID |"
    assert lines[4] == "| 2 | 5 | 6 [3, 5] |"
    assert lines[6:] == ["| mean of 2 | 5 | 5 [4, 6] |", "| mean of 2 | 10 | 4 [4, 4] |"]
    assert (
        score_summary.comparison_table([_result(4.0, asked=x) for x in "a|"]).splitlines()[3].startswith(r"| \| | 4 ")
    )
    results[0]["scores"]["KID"] = results[0]["scores"]["FID"]  # an earlier version stored the other result
    assert list(score_summary.mean_over_checkpoints(results)[0]["scores"]) == ["FID"]


@pytest.mark.parametrize(
    "field, other", [("n", 20), ("reference", "b"), ("network", {"weights": "v"}), ("scores", {"k": 5})]
)
def test_table_refuses_scores_of_different_protocols(field, other):
    results = [_result(4.0, step=1), _result(4.0, step=2)]
    results[1]["protocol"][field] = other
    with pytest.raises(ConfigError, match=f"do not share a table: {field} "):
        score_summary.comparison_table(results)
