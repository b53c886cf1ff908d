"""The feature networks by name, and feature extraction on all devices of a process.

`modes.reference` and `judge.open_judge` call it. To add a network, write a module with a class that
implements `Network`, and add a line for it to `config.choices.NETWORKS`.
"""

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from madformer_jax.config import choices
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks.network import Network

NETWORKS: dict[str, type[Network]] = {
    name: pkgutil.resolve_name(f"{__package__}.{path}") for name, path in choices.NETWORKS.items()
}
BATCH_PER_DEVICE = 16


class NetworkOutputs(NamedTuple):
    """Outputs of a network for n images, on the host."""

    features: np.ndarray  # (n, d) float32
    logits: np.ndarray | None  # (n, classes) float32; None if the network has no classes
    embedding: np.ndarray | None = None  # (n, e) float32 of `Network.embed`, if it was asked for
    inconsistency: np.ndarray | None = None  # (n,) of `Source.inconsistency`, which is no network


def network_class(name: str) -> type[Network]:
    """Returns the class of a network, whose fields require no weights.

    Raises:
      ConfigError: The name is unknown.
    """
    if name not in NETWORKS:
        raise ConfigError(f"config.evaluate.network={name!r} is unknown: one of {', '.join(map(repr, NETWORKS))}.")
    return NETWORKS[name]


def open_network(name: str, path: str) -> Network:
    """Opens the network `name` with the weights at `path`.

    Raises:
      ConfigError: The name is unknown, or the weights are missing or do not fit.
    """
    return network_class(name).open(path)


def make_extractor(network: Network, embed: bool = True) -> Callable[[np.ndarray], NetworkOutputs]:
    """Returns a function from images uint8 (n, H, W, c) to their `NetworkOutputs`.

    With `embed` they include the embedding, if the network has one.

    It runs on all devices of this process and accepts any n. An image's features do not depend on
    the other images of its batch. It raises ConfigError if the network does not accept the images.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), "images", axis_types=(AxisType.Auto,))
    batch_sharding = NamedSharding(mesh, PartitionSpec("images"))
    params = jax.device_put(network.params, NamedSharding(mesh, PartitionSpec()))
    embeds = embed and network.embeds

    @jax.jit
    def apply(params: Any, images: jax.Array) -> tuple[jax.Array | None, ...]:
        return *network.apply(params, images), network.embed(params, images) if embeds else None

    def extract(images: np.ndarray) -> NetworkOutputs:
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in network.channels:
            raise ConfigError(
                f"the network {network.name} cannot read images {images.dtype} {images.shape}: "
                f"it takes uint8 (n, H, W, {' or '.join(map(str, network.channels))})."
            )
        size = min(BATCH_PER_DEVICE, -(-len(images) // len(devices))) * len(devices)
        collected: list[list[np.ndarray]] = [[], [], []]
        for first in range(0, len(images), size):
            batch = images[first : first + size]
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
            with jax.set_mesh(mesh):  # the caller may have set the mesh of the model
                outputs = jax.device_get(apply(params, jax.device_put(padded, batch_sharding)))
            for arrays, output in zip(collected, outputs):
                if output is not None:
                    arrays.append(output[: len(batch)])
        features, logits, embedding = (np.concatenate(arrays) if arrays else None for arrays in collected)
        assert features is not None
        return NetworkOutputs(features, logits, embedding)

    return extract
