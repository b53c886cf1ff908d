"""Reference statistics, computed batch by batch."""

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import reference_statistics, scores
from madformer_jax.evaluation.memorization import TrainingFeatures


def test_statistics_do_not_depend_on_the_batches_and_a_fixed_sample_of_features_is_stored(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    x, labels = 100 + random.standard_normal((40, 5), np.float32), random.integers(0, 3, 40, np.int32)
    profile = random.random((40, 7))

    def save(ends):
        def batches():
            for first, end in zip([0, *ends], [*ends, 40]):
                mean = profile[first:end].sum(axis=0, keepdims=True) / max(1, end - first)
                rows = {"features": x[first:end], "labels": labels[first:end]}
                yield rows | {"profile": mean, "weight": np.array([end - first])}

        reference_statistics.save(str(tmp_path / "r.npz"), {"split": "test"}, batches, classes=4)
        with np.load(tmp_path / "r.npz") as file:
            return dict(file)

    whole = save([16, 16, 32])
    np.testing.assert_allclose(whole["mu"], x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(whole["sigma"], np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    np.testing.assert_array_equal(whole["features"], x)
    np.testing.assert_allclose(whole["profile"], profile.mean(axis=0))
    assert whole["counts"].tolist() == [*np.bincount(labels), 0]
    monkeypatch.setattr(reference_statistics, "MAX_STORED_FEATURES", 12)
    monkeypatch.setattr(scores, "TILE_ROWS", 10)
    few, same = save([16, 32]), save([3])
    stored = np.flatnonzero((x[:, None] == few["features"]).all(axis=2).any(axis=1))
    assert len(stored) == 12 and stored[-1] > 16
    np.testing.assert_array_equal(few["features"], x[stored])
    np.testing.assert_array_equal(few["labels"], labels[stored])
    np.testing.assert_array_equal(few["features"], same["features"])
    np.testing.assert_allclose(few["sigma"], whole["sigma"], rtol=1e-12)
    known = reference_statistics.load(str(tmp_path / "r.npz"))
    np.testing.assert_array_equal(known.features, x[stored])
    every = np.concatenate(list(reference_statistics.feature_tiles(known)))
    np.testing.assert_array_equal(np.sort(every, axis=0), np.sort(x, axis=0))
    x[np.setdiff1d(np.arange(40), stored)[0]] = 0  # an image that is not in `features`
    save([3])
    assert reference_statistics.load(str(tmp_path / "r.npz")).digest != known.digest


def test_all_training_images_are_searched_for_copies(tmp_path, monkeypatch, caplog):
    """`features` holds a quarter of the images, and other arrays the rest."""
    monkeypatch.setattr(reference_statistics, "MAX_STORED_FEATURES", 10)
    x, held_out = np.random.default_rng(0).standard_normal((2, 40, 5), np.float32)
    batch = {"features": x, "labels": np.zeros(40, np.int32), "profile": np.zeros((1, 7)), "weight": np.array([40])}
    digest = reference_statistics.save(str(tmp_path / "all.npz"), {}, lambda: iter([batch]), classes=0)
    training = TrainingFeatures(reference_statistics.load(str(tmp_path / "all.npz")), held_out)
    assert reference_statistics.load(str(tmp_path / "all.npz")).digest == digest
    assert (training.searched, training.images) == (40, 40) and not caplog.records
    copies = training.nearest(x[::-1])
    np.testing.assert_array_equal(copies.distances, 0)
    np.testing.assert_array_equal(copies.numbers, np.arange(40)[::-1])  # although the file has another order
    expected = np.linalg.norm(held_out[:, None] - x, axis=2).min(axis=1)
    np.testing.assert_allclose(training.held_out_distances, expected, rtol=1e-5)
    (tmp_path / "all.npz").write_bytes((tmp_path / "all.npz").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="all.npz is damaged or has changed"):
        training.nearest(x)


def test_features_that_are_not_finite_are_refused(tmp_path):
    batch = {"features": np.float32([[1, 2], [np.nan, 3]]), "labels": np.zeros(2, np.int32)}
    batch |= {"profile": np.zeros((1, 3)), "weight": np.array([2])}
    with pytest.raises(ConfigError, match="1 of 2 images are not finite"):
        reference_statistics.save(str(tmp_path / "r.npz"), {}, lambda: iter([batch]), classes=0)
    assert not (tmp_path / "r.npz").exists()
