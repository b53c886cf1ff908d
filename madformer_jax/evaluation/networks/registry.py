"""Features of images by a network of the table below. Another network is a file like `inception.py` and a line here."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import attribute_features, classifier_features, inception_features
from madformer_jax.evaluation.networks.network import Network

NETWORKS: dict[str, Callable[[str], Network]] = {
    "inception": inception_features.open_network,  # FID, KID, IS
    "attributes": attribute_features.open_network,  # FD-attributes, KID-attributes
    "classifier": classifier_features.open_network,  # FD-classifier, KID-classifier, and what class an image shows
}
BATCH_PER_DEVICE = 16  # images a device at a time


class NetworkOutputs(NamedTuple):
    """What a network says of n images, on the host."""

    features: np.ndarray  # (n, d) float32
    logits: np.ndarray | None  # (n, classes) float32


def open_network(name: str, path: str) -> Network:
    """The network of the table called `name` with the weights at `path`.

    Raises:
      ConfigError: the name is unknown, or the weights are not there or do not fit.
    """
    if name not in NETWORKS:
        raise ConfigError(f"config.evaluate.network={name!r} is unknown: one of {', '.join(map(repr, NETWORKS))}.")
    return NETWORKS[name](path)


def make_extractor(network: Network) -> Callable[[np.ndarray], NetworkOutputs]:
    """A function from images uint8 (n, H, W, c), any n, to their `Outputs`, on all devices of this process.

    An image's features do not depend on the images beside it. The function raises ConfigError where the network does
    not take images of c channels.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), "images", axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("images"))
    params = jax.device_put(network.params, NamedSharding(mesh, PartitionSpec()))
    apply = jax.jit(network.apply)

    def extract(images: np.ndarray) -> NetworkOutputs:
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in network.channels:
            raise ConfigError(
                f"images {images.dtype} {images.shape} are nothing for the network {network.name}: "
                f"it takes uint8 (n, H, W, {' or '.join(map(str, network.channels))})."
            )
        size = min(BATCH_PER_DEVICE, -(-len(images) // len(devices))) * len(devices)
        found, logits = [], []
        for first in range(0, len(images), size):
            part = images[first : first + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            with jax.set_mesh(mesh):  # its own, whatever mesh the images were drawn on
                outputs = jax.device_get(apply(params, jax.device_put(filled, split)))
            found.append(outputs[0][: len(part)])
            if outputs[1] is not None:
                logits.append(outputs[1][: len(part)])
        return NetworkOutputs(np.concatenate(found), np.concatenate(logits) if logits else None)

    return extract
