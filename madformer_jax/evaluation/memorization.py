"""Does a model repeat its training images? Distances to the nearest one, against those of images it cannot know."""

import functools
from collections.abc import Iterable

import numpy as np
from absl import logging

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import reference_statistics, scores
from madformer_jax.runtime import progress


class TrainingFeatures:
    """The training images that copies are looked for among: features in a reference file, searched tile by tile."""

    def __init__(self, training: reference_statistics.Reference, held_out: np.ndarray):
        """held_out: Features (m, d) of real images that the model has not seen."""
        self._training, self._held_out = training, held_out
        self.searched = training.stored
        self.images = int(training.protocol.get("n", self.searched))
        if self.searched < self.images:
            logging.warning(
                "memorisation is searched for among %d of %d training images: the reference of an earlier version keeps no "
                "more; make it again with --mode=reference to search all", self.searched, self.images,
            )  # fmt: skip

    def nearest(self, images: np.ndarray) -> np.ndarray:
        """See `nearest_distances`."""
        with progress.log_while(f"searching {self.searched} training images"):
            return nearest_distances(images, reference_statistics.feature_tiles(self._training))

    @functools.cached_property
    def typical(self) -> np.ndarray:
        """The distances (m,) of the held-out images: the same for every set of generated images."""
        return self.nearest(self._held_out)


def nearest_distances(images: np.ndarray, tiles: Iterable[np.ndarray]) -> np.ndarray:
    """Computes the distance of each image to its nearest training image, by an exact search.

    Memory holds one tile of training images, and distances of pairs of blocks as in `scores.inside_balls`.

    Args:
      images: Features (n, d).
      tiles: Features of the training images, each tile (m, d).

    Returns:
      Euclidean distances (n,), float64. A copy has exactly 0.

    Raises:
      ConfigError: There is no image, features are not finite, or they are of two networks.
    """
    x = scores.validate_features(images, "compared", at_least=1, needed_for="distances")
    centre: np.ndarray | None = None
    squares, nearest = np.full(len(x), np.inf), np.zeros_like(x)
    for tile in tiles:
        y = scores.validate_features(tile, "training", at_least=1, needed_for="distances")
        scores.check_same_features(x, y)
        # Any point near the features serves: distances of what is far from the origin would lose digits.
        centre = y.mean(axis=0, dtype=np.float64) if centre is None else centre
        for j in scores.row_slices(len(y)):
            for i in scores.row_slices(len(x)):
                found = scores.squared_distances(x[i] - centre, y[j] - centre)
                best = found.argmin(axis=1)
                least = found[np.arange(len(best)), best]
                closer = least < squares[i]
                nearest[i][closer] = y[j][best[closer]]
                squares[i] = np.minimum(squares[i], least)
    if centre is None:
        raise ConfigError("0 training images are too few for distances: give 1 or more.")
    # Rounding differs from block to block. Only the choice of the nearest one depends on it.
    return np.concatenate(
        [np.linalg.norm(x[i].astype(np.float64) - nearest[i], axis=1) for i in scores.row_slices(len(x))]
    )


def memorization_ratio(generated: np.ndarray, held_out: np.ndarray) -> float:
    """Mean nearest distance of generated images (n,) over that of held-out real ones (m,), both from the training images.

    About 1 for a model that draws new images as unlike the training set as real ones are; 0 for copies.

    Raises:
      ConfigError: the held-out images are copies of training images, so that there is nothing to compare with.
    """
    typical = float(np.mean(held_out))
    if not typical:
        raise ConfigError("memorisation: every held-out image is also a training image: hold other images out.")
    return float(np.mean(generated)) / typical
