"""`Network`: the interface between a feature network and the scores.

Each network's module has a function `open_network(path)` that returns a `Network`. `registry` lists
these functions. Scores, references and protocols use nothing else of a network.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from madformer_jax.weights.fingerprint import fingerprint

Array = jax.Array


class Network(NamedTuple):
    """A network that turns images into features."""

    name: str  # a key of `registry.NETWORKS`
    metadata: Mapping[str, Any]  # JSON for the protocol of a score, besides name, weights and dims
    feature_dim: int  # d
    channels: tuple[int, ...]  # numbers of image channels that it accepts
    params: Mapping[str, Any]
    # Pure function of params and images uint8 (B, H, W, c). It returns features (B, d) and logits
    # (B, classes) or None, both float32.
    apply: Callable[[Any, Array], tuple[Array, Array | None]]

    def describe(self) -> dict[str, Any]:
        """Returns the network as JSON for the protocol of a score.

        Scores are comparable only if their networks have equal descriptions.
        """
        return {"name": self.name, "weights": fingerprint(self.params), "dims": self.feature_dim, **self.metadata}
