"""The reader of attributes as a feature network: it tells pictures apart that a classifier of a few styles takes for alike."""

from typing import Any

from jax import Array

from madformer_jax.evaluation.networks import attribute_classifier as model
from madformer_jax.evaluation.networks.network import Network


def open_network(path: str) -> Network:
    """The reader that --mode=reference wrote to `path`.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    trained = model.load(path)
    about = {"attributes": len(trained.values), "accuracy": trained.accuracy, "held_out": trained.held_out}

    def apply(params: Any, images: Array) -> tuple[Array, None]:
        return model.extract_features(params, images, trained.values), None

    return Network("attributes", about, model.FEATURE_DIM, (3,), trained.params, apply)
