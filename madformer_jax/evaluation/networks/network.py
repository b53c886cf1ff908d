"""`Network`: the interface between a feature network and the scores.

Each network is a class in a module of its own, listed in `config.choices.NETWORKS`. Scores, references and
protocols ask it for its facts and never compare its name.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np

from madformer_jax.weights.fingerprint import fingerprint

Array = jax.Array


class TrainingSet(NamedTuple):
    """Images of a data set and what a network learns to predict from them."""

    images: np.ndarray  # uint8 (n, s, s, c) with s in `Network.input_sizes`
    targets: np.ndarray  # int: labels (n,) or attributes (n, A), see `Network.learns`
    values: tuple[int, ...]  # number of classes, or of values of each attribute


class Network(Protocol):
    """A network that turns images into features.

    The first group of fields and the class methods require no weights.
    """

    name: str  # value of `evaluate.network`, its key in `choices.NETWORKS`
    weights_file: str  # name of the weights in a workdir, unless `evaluate.network_path` names a file; need not exist
    # Sides to which `apply` resizes: the smallest that the image fits in, or the last; (): any side.
    input_sizes: tuple[int, ...]
    feature_layer: str  # layer whose outputs are the features
    feature_dim: int  # d
    learns: Literal["", "labels", "attributes"] = ""  # targets on which --mode=reference trains it; "": it does not

    channels: tuple[int, ...]  # numbers of image channels that it accepts
    params: Mapping[str, Any]  # {} without weights
    embeds: bool = False  # whether `embed` exists
    metadata: Mapping[str, Any] = {}  # JSON for the protocol of a score, besides name, weights and dims

    @classmethod
    def open(cls, path: str) -> "Network":
        """Opens the network with the weights at `path`, which a network without weights ignores.

        Raises:
          ConfigError: The weights are missing or do not fit.
        """
        return cls()

    @classmethod
    def train(cls, path: str, training: TrainingSet, held_out: TrainingSet) -> None:
        """Trains the network, logs its accuracy on held-out images, and writes it to `path`.

        Raises:
          ConfigError: There are too few images or classes.
        """
        raise TypeError(f"{cls.__name__} does not learn.")

    def apply(self, params: Any, images: Array) -> tuple[Array, Array | None]:
        """Computes features (B, d), and logits (B, classes) or None, both float32. A pure function.

        Args:
          params: Parameters like those of the network.
          images: uint8 (B, H, W, c).
        """

    def embed(self, params: Any, images: Array) -> Array:
        """Computes vectors (B, e) float32 whose squared distances are LPIPS. A pure function, see `apply`."""
        raise TypeError(f"{self.name} does not embed.")

    @classmethod
    def score_name(cls, score: str) -> str:
        """Returns the name of a score of this network's features, such as KID-classifier for "KID"."""
        return f"{'FD' if score == 'FID' else score}-{cls.name}"

    def describe(self) -> dict[str, Any]:
        """Returns the network as JSON for the protocol of a score.

        Scores are comparable only if their networks have equal descriptions.
        """
        return {"name": self.name, "weights": fingerprint(self.params), "dims": self.feature_dim, **self.metadata}
