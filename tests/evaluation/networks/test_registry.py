"""Feature extraction with the networks of the registry."""

import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import inception_v3 as model
from madformer_jax.evaluation.networks import inception_weights as weights
from madformer_jax.evaluation.networks import registry
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.weights.fingerprint import fingerprint


class Toy(Network):
    """Means of the color channels: what the documentation says that a new network needs."""

    name, weights_file, input_sizes, feature_layer, feature_dim = "toy", "toy.npz", (), "means", 3
    channels, params, metadata = (3,), {"w": np.float32([1, 2, 3])}, {"made": "here"}

    @classmethod
    def open(cls, path):
        return cls()

    def apply(self, params, images):
        return params["w"] * images.astype(jnp.float32).mean(axis=(1, 2)), None


TOY = Toy()


def test_inception_returns_the_features_of_fid_and_unbiased_logits(monkeypatch):
    def outputs(params, images):
        assert images.shape == (2, 8, 8, 3)  # grayscale images become RGB
        return model.Features(*(params["w"] + i for i in range(6)))

    monkeypatch.setattr(model, "features", outputs)
    monkeypatch.setattr(weights, "load", lambda path: {"w": np.float32(0)})
    network = registry.open_network("inception", "somewhere")
    for channels in network.channels:
        assert network.apply(network.params, jnp.zeros((2, 8, 8, channels), jnp.uint8)) == (3, 4)
    assert model.Features._fields[3:5] == ("f2048", "logits_unbiased")


def test_batches_are_padded_and_cut(monkeypatch):
    monkeypatch.setattr(registry, "BATCH_PER_DEVICE", 2)
    images = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 3), dtype=np.uint8)
    for n in (1, 16, 37):
        outputs = registry.make_extractor(TOY)(images[:n])
        assert outputs.logits is None and outputs.features.dtype == np.float32
        np.testing.assert_allclose(outputs.features, images[:n].mean(axis=(1, 2)) * [1, 2, 3], rtol=1e-5)


def test_networks_have_names_and_fingerprints():
    assert TOY.describe() == {"name": "toy", "weights": fingerprint(TOY.params), "dims": 3, "made": "here"}
    other = {"w": np.float32([1, 2, 3.0001])}
    assert len({fingerprint(x) for x in (TOY.params, other, {"v": other["w"]}, {"w": other["w"][None]})}) == 4
    with pytest.raises(ConfigError, match="'inception', 'attributes', 'classifier'"):
        registry.open_network("dino", "")
    for wrong in (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ConfigError, match="toy"):
            registry.make_extractor(TOY)(wrong)
