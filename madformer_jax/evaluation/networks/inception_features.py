"""The Inception network of FID as a feature network."""

import jax.numpy as jnp
from etils import epath
from jax import Array

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import inception_v3 as model
from madformer_jax.evaluation.networks import inception_weights as weights
from madformer_jax.evaluation.networks.network import Network


def open_network(path: str) -> Network:
    """The network with the weights at `path`: a checkpoint file of the original, or a folder of --mode=convert.

    Raises:
      ConfigError: there are none, or they do not fit.
    """
    try:
        params = weights.load(path)
    except ConfigError:
        if epath.Path(path).exists():
            raise
        raise ConfigError(
            f"there are no Inception weights at {path}: make them with --mode=convert --config.convert.inception=FILE, or name "
            "them in config.evaluate.network_path."
        ) from None
    return Network("inception", {}, 2048, (1, 3), params, _apply)


def _apply(params: model.Params, images: Array) -> tuple[Array, Array]:
    """Grey images are taken as RGB of three equal channels."""
    rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))
    outputs = model.features(params, rgb)
    return outputs.f2048, outputs.logits_unbiased
