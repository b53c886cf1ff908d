"""Feature network `inception`: the network of FID, KID and the inception score."""

from typing import Any

import jax.numpy as jnp
from etils import epath

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import inception_v3, inception_weights
from madformer_jax.evaluation.networks.network import Array, Network


class Inception(Network):
    """Inception-v3 with the weights that --mode=convert wrote, or a checkpoint file."""

    name, weights_file = "inception", "inception"
    input_sizes, channels = (inception_v3.IMAGE_SIZE,), (1, 3)
    feature_layer, feature_dim = "f2048", 2048

    @classmethod
    def open(cls, path: str) -> "Inception":
        try:
            return cls(inception_weights.load(path))
        except ConfigError:
            if epath.Path(path).exists():
                raise
            raise ConfigError(
                f"{path} does not exist: make the weights of Inception with --mode=convert --config.convert.inception=FILE, "
                "or name them in config.evaluate.network_path."
            ) from None

    def __init__(self, params: inception_v3.Params):
        self.params = params

    def apply(self, params: Any, images: Array) -> tuple[Array, Array]:
        rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))  # gray images get three equal channels
        outputs = inception_v3.features(params, rgb)
        features: Array = getattr(outputs, self.feature_layer)
        return features, outputs.logits_unbiased

    @classmethod
    def score_name(cls, score: str) -> str:
        return score
