import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import attribute_classifier, registry

VALUES = (3, 2)


def pictures(n, seed):
    """Returns noisy pictures with attribute 0 in the left half and attribute 1 in the right."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.integers(0, count, n) for count in VALUES], axis=1).astype(np.int32)
    images = rng.integers(0, 60, (n, 64, 64, 3))
    for k in (1, 2):
        images[rows[:, 0] == k, :, :32, k - 1] += 150
    images[rows[:, 1] == 1, :, 32:] += 150
    return images.astype(np.uint8), rows


@pytest.mark.slow
def test_attributes_are_learned_and_the_file_restores_the_classifier(monkeypatch, tmp_path):
    monkeypatch.setattr(attribute_classifier, "BATCH", 8)
    held_out_images, rows = pictures(20, 1)
    trained = attribute_classifier.train(*pictures(64, 0), held_out_images, rows, VALUES, steps=40)
    assert trained.accuracy > 0.9 and trained.held_out == 20
    predicted = attribute_classifier.predict(trained, held_out_images)
    matching, requested = attribute_classifier.count_matches(rows, predicted)
    assert matching.sum() / requested.sum() == pytest.approx(trained.accuracy)
    attribute_classifier.save(str(tmp_path / "attributes.npz"), trained)
    restored = attribute_classifier.load(str(tmp_path / "attributes.npz"))
    np.testing.assert_array_equal(attribute_classifier.predict(restored, held_out_images), predicted)
    assert restored[1:] == trained[1:]
    network = registry.open_network("attributes", str(tmp_path / "attributes.npz"))
    x = registry.make_extractor(network)(held_out_images).features
    distance = np.square(x[:, None] - x[None]).mean(axis=-1)
    alike = (rows[:, None] == rows[None]).all(axis=-1) & ~np.eye(len(rows), dtype=bool)
    assert (
        x.shape == (20, attribute_classifier.FEATURE_DIM)
        and distance[alike].mean() < 0.3 * distance[(rows[:, None] != rows[None]).any(axis=-1)].mean()
    )


def test_training_needs_held_out_pictures():
    images, rows = pictures(2, 0)
    with pytest.raises(ConfigError, match="needs pictures"):
        attribute_classifier.train(images, rows, images[:0], rows[:0], VALUES)
