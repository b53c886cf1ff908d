"""What a feature network is to the scores, whichever it is."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

Array = jax.Array


class Network(NamedTuple):
    """A network that turns images into features."""

    name: str  # as in `features.NETWORKS`
    about: Mapping[str, Any]  # what the protocol of a score says of it beside name, weights and dims; JSON
    dims: int  # d
    channels: tuple[int, ...]  # that its images may have
    params: Mapping[str, Any]
    apply: Callable[[Any, Array], tuple[Array, Array | None]]
    # pure: (params, images uint8 (B, H, W, c)) -> features (B, d), logits (B, classes) or None, float32

    def describe(self) -> dict[str, Any]:
        """The network as JSON, for the protocol of a score: scores of two of them are not comparable."""
        return {"name": self.name, "weights": digest(self.params), "dims": self.dims, **self.about}


def digest(params: Mapping[str, Any]) -> str:
    """Hash of a tree of weights: of the names, shapes, types and values of its arrays."""
    sha = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params).items()):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]
