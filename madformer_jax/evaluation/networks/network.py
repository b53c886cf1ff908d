"""What a feature network is to the scores, whichever it is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from madformer_jax.weights.fingerprint import fingerprint

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
        return {"name": self.name, "weights": fingerprint(self.params), "dims": self.dims, **self.about}
