"""The Inception network of FID as a feature network."""

import jax.numpy as jnp
from jax import Array

from madformer_jax.evaluation.network import Network
from madformer_jax.models import inception as model
from madformer_jax.weights import inception as weights


def open_network(path: str) -> Network:
    """The network with the weights at `path`: a checkpoint file of the original, or a folder of --mode=convert.

    Raises:
      ConfigError: there are none, or they do not fit.
    """
    return Network("inception", {}, 2048, (1, 3), weights.load(path), _apply)


def _apply(params: model.Params, images: Array) -> tuple[Array, Array]:
    """Grey images are taken as RGB of three equal channels."""
    rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))
    outputs = model.features(params, rgb)
    return outputs.f2048, outputs.logits_unbiased
