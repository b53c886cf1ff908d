"""Does a model repeat its training images? Distances to the nearest one, against those of images it cannot know."""

import numpy as np

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import scores


def nearest_distances(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Euclidean distance of each of features (n, d) to the nearest of (m, d): (n,) float64; a copy has exactly 0.

    Goes over pairs of blocks, as `scores.inside_balls`.

    Raises:
      ConfigError: no image, features that are not finite, or of two networks.
    """
    x = scores.checked(images, "compared", at_least=1, needed_for="distances")
    y = scores.checked(training, "training", at_least=1, needed_for="distances")
    scores.check_same_features(x, y)
    centre = y.mean(axis=0, dtype=np.float64)
    squares, nearest = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
    for i in scores.blocks(len(x)):
        for j in scores.blocks(len(y)):
            found = scores.squared_distances(x[i] - centre, y[j] - centre)
            best = found.argmin(axis=1)
            least = found[np.arange(len(best)), best]
            nearest[i] = np.where(least < squares[i], j.start + best, nearest[i])
            squares[i] = np.minimum(squares[i], least)
    return np.concatenate(
        [np.linalg.norm(x[i].astype(np.float64) - y[nearest[i]], axis=1) for i in scores.blocks(len(x))]
    )


def memorisation(generated: np.ndarray, held_out: np.ndarray) -> float:
    """Mean nearest distance of generated images (n,) over that of held-out real ones (m,), both from the training images.

    About 1 for a model that draws new images as unlike the training set as real ones are; 0 for copies.

    Raises:
      ConfigError: the held-out images are copies of training images, so that there is nothing to compare with.
    """
    typical = float(np.mean(held_out))
    if not typical:
        raise ConfigError("memorisation: every held-out image is also a training image: hold other images out.")
    return float(np.mean(generated)) / typical
