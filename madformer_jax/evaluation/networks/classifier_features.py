"""The classifier that is trained on the data set as a feature network."""

import functools

from madformer_jax.evaluation.networks import classifier as model
from madformer_jax.evaluation.networks.network import Network


def open_network(path: str) -> Network:
    """The classifier that --mode=reference wrote to `path`.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    trained = model.load(path)
    about = {"classes": trained.classes, "accuracy": trained.accuracy, "held_out": trained.held_out}
    apply = functools.partial(model.apply, classes=trained.classes)
    return Network("classifier", about, model.FEATURE_DIM, (trained.channels,), trained.params, apply)
