"""All scores of a set of images against the score functions, and tables of results."""

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import score_summary, scores, seams
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
    settings = {"recognize": True, "grid": (2, 2), "shape": (8, 12)} | settings
    return score_summary.compute_scores(network, arrays, reference, **settings), reference


def test_all_scores_have_their_name_their_value_and_an_interval(arrays):
    out, reference = _compute_scores(arrays, training=_training())
    x, y = arrays["features"], reference.features
    steps = seams.border_and_interior_steps(arrays["profile"], (8, 12), 2, 2)
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
    assert out.keys() - expected.keys() == {"memorisation"}
    assert out["KID"]["deviation"] == scores.kernel_distance(x, y)[1]
    assert out["seam"]["real"] == seams.seam_score(
        seams.border_and_interior_steps(reference.profile[None], (8, 12), 2, 2)
    )
    for score in out.values():
        assert score["low"] < score["value"] < score["high"]


def _training():
    x, held_out = np.random.default_rng(2).standard_normal((2, 20, 5))
    return TrainingFeatures(Reference({"n": 20}, "", scores.Gaussian.from_features(x), x, None, stored=20), held_out)


def test_memorization_score_has_the_number_of_searched_images(arrays):
    score = _compute_scores(arrays, training=_training())[0]["memorisation"]
    assert (score["searched"], score["training"]) == (20, 20)


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


def test_scores_of_another_network_end_in_its_name(arrays):
    out, _ = _compute_scores(arrays, ClassifierNetwork, recognize=False, grid=(1, 1))
    assert list(out) == [f"{name}-classifier" for name in ("FD", "KID", "IS", "precision", "recall")]


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


@pytest.mark.parametrize(
    "field, other", [("n", 20), ("reference", "b"), ("network", {"weights": "v"}), ("scores", {"k": 5})]
)
def test_table_refuses_scores_of_different_protocols(field, other):
    results = [_result(4.0, step=1), _result(4.0, step=2)]
    results[1]["protocol"][field] = other
    with pytest.raises(ConfigError, match=f"do not share a table: {field} "):
        score_summary.comparison_table(results)
