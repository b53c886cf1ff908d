import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import attribute_classifier, registry

VALUES = (3, 2)


def pictures(n, seed):
    """Half red or green or neither on the left (attribute 0), white or not on the right (attribute 1), with noise."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.integers(0, count, n) for count in VALUES], axis=1).astype(np.int32)
    images = rng.integers(0, 60, (n, 64, 64, 3))
    for k in (1, 2):
        images[rows[:, 0] == k, :, :32, k - 1] += 150
    images[rows[:, 1] == 1, :, 32:] += 150
    return images.astype(np.uint8), rows


def test_a_reader_learns_the_attributes_of_pictures_and_comes_back_from_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(attribute_classifier, "BATCH", 8)
    held, rows = pictures(20, 1)
    trained = attribute_classifier.train(*pictures(64, 0), held, rows, VALUES, steps=40)
    assert trained.accuracy > 0.9 and trained.held_out == 20
    found = attribute_classifier.predict(trained, held)
    shown, asked = attribute_classifier.count_matches(rows, found)
    assert shown.sum() / asked.sum() == pytest.approx(trained.accuracy)
    attribute_classifier.save(str(tmp_path / "attributes.npz"), trained)
    again = attribute_classifier.load(str(tmp_path / "attributes.npz"))
    np.testing.assert_array_equal(attribute_classifier.predict(again, held), found)
    assert again[1:] == trained[1:]
    network = registry.open_network(
        "attributes", str(tmp_path / "attributes.npz")
    )  # the same file as a network of features
    x = registry.make_extractor(network)(held).features
    apart = np.square(x[:, None] - x[None]).mean(axis=-1)
    alike = (rows[:, None] == rows[None]).all(axis=-1) & ~np.eye(len(rows), dtype=bool)
    assert (
        x.shape == (20, attribute_classifier.FEATURE_DIM)
        and apart[alike].mean() < 0.3 * apart[(rows[:, None] != rows[None]).any(axis=-1)].mean()
    )


def test_none_is_not_asked_for():
    shown, asked = attribute_classifier.count_matches(
        np.array([[1, 0, 2], [0, 0, 0]]), np.array([[1, 3, 1], [1, 0, 0]])
    )
    assert shown.tolist() == [1, 0] and asked.tolist() == [2, 0]


def test_pictures_to_learn_from_and_to_measure_by_are_needed():
    images, rows = pictures(2, 0)
    with pytest.raises(ConfigError, match="needs pictures"):
        attribute_classifier.train(images, rows, images[:0], rows[:0], VALUES)
