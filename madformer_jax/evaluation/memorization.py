"""The memorization scores: distances of generated images to their nearest training images.

They are relative to the distances of held-out real images.

`judge` opens `TrainingFeatures`, and `score_summary` computes the scores from them.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import reference_statistics, scores
from madformer_jax.runtime import progress


class Nearest(NamedTuple):
    """The nearest training image of each of n images."""

    distances: np.ndarray  # (n,) Euclidean, float64; a copy has exactly 0
    numbers: np.ndarray  # (n,) row of the tiles, or number of the training image (`TrainingFeatures.nearest`)


class TrainingFeatures:
    """Features of the training images in a reference file, for the nearest-neighbor search."""

    def __init__(self, training: reference_statistics.Reference, held_out: np.ndarray):
        """Initializes the search.

        Args:
          training: Reference of the training images, with features.
          held_out: Features (m, d) of real images that the model has not seen.
        """
        self.reference, self._held_out = training, held_out
        self.searched = training.stored
        self.images = int(training.protocol.get("n", self.searched))

    def nearest(self, images: np.ndarray) -> Nearest:
        """Finds the nearest training images of images (n, d), by their numbers in the training set."""
        with progress.log_while(f"searching {self.searched} training images"):
            rows = find_nearest(images, reference_statistics.feature_tiles(self.reference))
        order = reference_statistics.tile_order(self.images)
        return rows._replace(numbers=order[rows.numbers])

    @functools.cached_property
    def held_out_distances(self) -> np.ndarray:
        """The distances (m,) of the held-out images."""
        return self.nearest(self._held_out).distances


def find_nearest(images: np.ndarray, tiles: Iterable[np.ndarray]) -> Nearest:
    """Finds the nearest training image of each image, by an exact search.

    Memory holds one tile of training images and a tile of distances, as in `scores.inside_balls`.

    Args:
      images: Features (n, d).
      tiles: Features of the training images, each tile (m, d).

    Raises:
      ConfigError: There are no images, features are not finite, or the numbers of features differ.
    """
    x = scores.validate_features(images, "compared", minimum=1, purpose="distances")
    center: np.ndarray | None = None
    squares, nearest = np.full(len(x), np.inf), np.zeros_like(x)
    numbers, first = np.zeros(len(x), np.int64), 0
    for tile in tiles:
        y = scores.validate_features(tile, "training", minimum=1, purpose="distances")
        scores.check_same_features(x, y)
        # Distances between points far from the origin lose digits. A center near the features
        # avoids this.
        center = y.mean(axis=0, dtype=np.float64) if center is None else center
        for j in scores.row_slices(len(y)):
            for i in scores.row_slices(len(x)):
                distances = scores.squared_distances(x[i] - center, y[j] - center)
                best = distances.argmin(axis=1)
                minimum = distances[np.arange(len(best)), best]
                closer = minimum < squares[i]
                nearest[i][closer] = y[j][best[closer]]
                numbers[i][closer] = first + j.start + best[closer]
                squares[i] = np.minimum(squares[i], minimum)
        first += len(y)
    if center is None:
        raise ConfigError("0 training images are too few for distances: give 1 or more.")
    # Squared distances of different tiles round differently, so the distances are recomputed.
    exact = [np.linalg.norm(x[i].astype(np.float64) - nearest[i], axis=1) for i in scores.row_slices(len(x))]
    return Nearest(np.concatenate(exact), numbers)


def memorization_ratio(generated: np.ndarray, held_out: np.ndarray) -> float:
    """Divides the mean distance (n,) of generated images to the training images by that of held-out images (m,).

    The ratio is about 1 if generated images differ from the training images as much as real images
    do. It is 0 for copies of training images.

    Raises:
      ConfigError: All held-out images are training images.
    """
    held_out_mean = float(np.mean(held_out))
    if not held_out_mean:
        raise ConfigError("memorization: every held-out image is also a training image: hold other images out.")
    return float(np.mean(generated)) / held_out_mean
