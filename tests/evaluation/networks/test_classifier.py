"""The classifier that is trained on the data set."""

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import classifier, fit, registry
from madformer_jax.weights.fingerprint import fingerprint


def _stripes(n, seed):
    """Returns noisy images (n, 32, 32, 3) with horizontal (0), vertical (1) or no (2) stripes."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    wave = np.sin(np.arange(32) * 0.8 + random.uniform(0, 6, (n, 1)))
    images = np.zeros((n, 32, 32, 3))
    images[labels == 0] = wave[labels == 0][:, :, None, None]
    images[labels == 1] = wave[labels == 1][:, None, :, None]
    return np.clip(128 + 60 * images + random.normal(0, 20, images.shape), 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained():
    return classifier.train(*_stripes(128, 0), *_stripes(90, 1), steps=20)


def test_training_learns_the_classes_and_is_deterministic(trained, tmp_path):
    assert (trained.classes, trained.channels, trained.held_out) == (3, 3, 90)
    assert trained.accuracy > 0.9
    images, labels = _stripes(90, 1)
    features, logits = classifier.apply(trained.params, images, classes=3)
    assert features.shape == (90, classifier.FEATURE_DIM)
    assert np.mean(logits.argmax(axis=1) == labels) == trained.accuracy
    again = classifier.train(*_stripes(128, 0), *_stripes(90, 1), steps=20)
    assert fingerprint(again.params) == fingerprint(trained.params)
    classifier.save(tmp_path / "classifier.npz", trained)
    network = registry.open_network("classifier", str(tmp_path / "classifier.npz"))
    assert network.describe() == {
        "name": "classifier", "weights": fingerprint(trained.params), "dims": 64, "classes": 3, "accuracy": trained.accuracy,
        "held_out": 90,
    }  # fmt: skip
    assert network.channels == (3,)
    assert all(np.array_equal(a, b) for a, b in zip(network.apply(network.params, images), (features, logits)))


@pytest.mark.parametrize(
    "shape, side", [((2, 28, 28, 1), 32), ((2, 32, 32, 3), 32), ((2, 33, 20, 3), 64), ((2, 256, 256, 1), 64)]
)
def test_images_of_any_size_are_resized(shape, side):
    images = np.full(shape, 200, np.uint8)
    images[:, : shape[1] // 2] = 0
    small = np.asarray(fit.resize(images, classifier.IMAGE_SIZES))
    assert small.shape == (2, side, side, shape[-1]) and small.dtype == np.uint8
    assert abs(small.mean() - images.mean()) < 2


def test_unlabeled_images_and_wrong_files_are_refused(trained, tmp_path):
    images, labels = _stripes(6, 0)
    with pytest.raises(ConfigError, match="no labels"):
        classifier.train(images, labels * 0, images, labels)
    with pytest.raises(ConfigError, match="held-out"):
        classifier.train(images, labels, images[:0], labels[:0])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match="does not say its classes"):
        classifier.load(tmp_path / "other.npz")
    with pytest.raises(ConfigError, match="no such file"):
        classifier.load(tmp_path / "none.npz")
    fewer = trained._replace(params={k: v for k, v in trained.params.items() if k != "classes"})
    classifier.save(tmp_path / "fewer.npz", fewer)
    with pytest.raises(ConfigError, match="classes.kernel"):
        classifier.load(tmp_path / "fewer.npz")
