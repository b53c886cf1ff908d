"""A picture of the samples that are nearest to training images, above those training images.

`modes.evaluate` writes it beside a result with the score `memorized`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images
from madformer_jax.evaluation.reference_statistics import Reference


def load(
    c: ConfigDict, training: Reference, pairs: Sequence[Sequence[float]], read: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray | None:
    """Loads the images of pairs.

    Args:
      c: The config, which opens the data set.
      pairs: Entry `pairs` of the score `memorized`.
      read: Reads the scored images uint8 (b, H, W, c) with ascending numbers (b,).

    Returns:
      Images uint8 (2, pairs, H, W, c): the scored images, then their nearest training images. None,
      with a warning, if the data set of the training images cannot be read.
    """
    scored, numbers = np.array([pair[:2] for pair in pairs], np.int64).T
    scored_images = _in_any_order(read, scored)  # first, because all processes sample together
    try:
        data = images.from_source(
            c, training.protocol.get("split", ""), shuffled=False, config_field="evaluate.training"
        )
        if (data.protocol["fingerprint"], data.n) != tuple(training.protocol.get(x) for x in ("fingerprint", "n")):
            raise ConfigError("they differ from the images that config.data.source opens, or some are unreadable.")
        nearest = _in_any_order(lambda x: data.read(x).images, numbers)
    except ConfigError as error:
        logging.warning("no picture of the nearest training images: %s", error)
        return None
    return np.stack([scored_images, nearest])


def _in_any_order(read: Callable[[np.ndarray], np.ndarray], numbers: np.ndarray) -> np.ndarray:
    unique, rows = np.unique(numbers, return_inverse=True)
    return read(unique)[rows]
