"""Scores of generated against real images, as pure functions of their feature arrays.

Conventions are those of torch-fidelity 0.4.0, number for number. Arrays are (n, d), any float type, computed in float64 and in parts.

| score | function | exactly |
|---|---|---|
| FID, or FD on other features | `frechet` | Gaussians with covariances over n - 1, no epsilon |
| KID | `kernel_distance` | kernel (x.y / d + 1)^3, unbiased, over subsets |
| IS | `inception_score` | of logits without bias, shuffled, over splits |
| precision, recall | `precision_recall` | balls that reach the k-th neighbour, itself not counted (arXiv 1904.06991) |
"""

from typing import NamedTuple

import numpy as np

from madformer_jax.errors import ConfigError

TILE_ROWS = 2048  # images whose distances to as many others are in memory at a time
RELATIVE_TIE_TOLERANCE = (
    1e-12  # relative to squared norms: above what float64 rounds, below any difference that is meant
)


class Gaussian(NamedTuple):
    """Mean and covariance of features; the covariance (d, d) as `root.T @ root`, which is small for few images."""

    mean: np.ndarray  # (d,)
    root: np.ndarray  # (r, d), r at most d or the number of images

    @classmethod
    def of(cls, features: np.ndarray, what: str = "images") -> "Gaussian":
        """The Gaussian of features (n, d).

        Raises:
          ConfigError: less than two images, or features that are not finite; `what` names the set there.
        """
        x = validate_features(features, what, at_least=2, needed_for="a covariance")
        mean, d = x.mean(axis=0, dtype=np.float64), x.shape[1]
        if len(x) <= d:
            return cls(mean, (x - mean) / np.sqrt(len(x) - 1))
        centred = (x[block] - mean for block in row_slices(len(x)))
        return cls.from_covariance(mean, sum(((z.T @ z) for z in centred), np.zeros((d, d))) / (len(x) - 1), what)

    @classmethod
    def from_covariance(cls, mean: np.ndarray, covariance: np.ndarray, what: str = "statistics") -> "Gaussian":
        """The Gaussian of a mean (d,) and a covariance (d, d), as in the `mu`, `sigma` of reference files.

        Raises:
          ConfigError: the shapes do not fit, or the matrix is no covariance.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ConfigError(
                f"{what}: mean {mean.shape} and covariance {covariance.shape} do not fit: they must be (d,) and (d, d)."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ConfigError(f"{what}: mean or covariance is not finite: compute the statistics anew.")
        size = np.abs(covariance).max(initial=0.0)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-3 * size or values.min(initial=0.0) < -1e-3 * size:
            raise ConfigError(f"{what}: the matrix is no covariance (not symmetric, or with negative eigenvalues).")
        return cls(mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def frechet(generated: np.ndarray | Gaussian, real: np.ndarray | Gaussian) -> float:
    """The Frechet distance |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2) of two Gaussians (FID, arXiv 1706.08500).

    With S = R^T R the last trace is the sum of the singular values of R1 R2^T: no square root of a matrix, and for n
    images with more features than that an n x n problem.

    Args:
      generated, real: features (n, d), or the Gaussian of features that are not at hand.

    Raises:
      ConfigError: less than two images, features that are not finite, or of two networks.
    """
    a, b = _as_gaussian(generated, "generated"), _as_gaussian(real, "real")
    check_same_features(a.root, b.root)
    cross = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    return float(max(0.0, np.sum((a.mean - b.mean) ** 2) + np.sum(a.root**2) + np.sum(b.root**2) - 2 * cross))


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and deviation over subsets of the unbiased squared kernel distance (KID, arXiv 1801.01401).

    Args:
      generated, real: features (n, d).
      subsets: how many are drawn, each without replacement.
      subset_size: images of each set in a subset; sets that have less of them are taken whole.

    Raises:
      ConfigError: less than two images, features that are not finite, or of two networks.
    """
    x = validate_features(generated, "generated", at_least=2, needed_for="the kernel distance")
    y = validate_features(real, "real", at_least=2, needed_for="the kernel distance")
    check_same_features(x, y)
    size = min(subset_size, len(x), len(y))
    if size < 2 or subsets < 1:
        raise ConfigError(
            f"kernel distance over {subsets} subsets of {size}: it needs one subset of two images at least."
        )
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        a = x[random.choice(len(x), size, replace=False)].astype(np.float64)  # the order of the draws is the convention
        b = y[random.choice(len(y), size, replace=False)].astype(np.float64)
        within = sum((kernel(z, z).sum() - kernel_diagonal(z).sum()) / (size * (size - 1)) for z in (a, b))
        distances.append(within - 2 * kernel(a, b).mean())
    return float(np.mean(distances)), float(np.std(distances))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's polynomial kernel of each of (n, d) with each of (m, d): (n, m)."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # a power is 20 times as slow


def kernel_diagonal(x: np.ndarray) -> np.ndarray:
    """The diagonal of `kernel(x, x)`: (n,)."""
    return (np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and deviation over splits of exp(mean KL(p(y|x) || p(y))) (IS, arXiv 1606.03498).

    Args:
      logits: (n, classes), those without the bias of the last layer.
      splits: parts into which the shuffled images are cut.

    Raises:
      ConfigError: fewer images than splits, or logits that are not finite.
    """
    values = []
    for part in split_logits(logits, splits, seed):
        log_p = log_softmax(part)
        p = np.exp(log_p)
        values.append(np.exp(np.mean(np.sum(p * log_p, axis=1)) + entropy(p.mean(axis=0))))
    return float(np.mean(values)), float(np.std(values))


def split_logits(logits: np.ndarray, splits: int, seed: int) -> list[np.ndarray]:
    """The parts of logits (n, classes) over which the inception score goes.

    Raises:
      ConfigError: fewer images than splits, or logits that are not finite.
    """
    x = validate_features(
        logits, "logits", at_least=max(1, splits), needed_for=f"an inception score over {splits} splits"
    )
    if splits < 1:
        raise ConfigError(f"inception score over {splits} splits: it needs one at least.")
    x = x[np.random.RandomState(seed).permutation(len(x))].astype(np.float64)
    return [x[i * len(x) // splits : (i + 1) * len(x) // splits] for i in range(splits)]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns `above / below` of arrays that are not negative: 1 where both are 0, infinite where only `below` is."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.where(above > 0, np.inf, 1.0), where=below > 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the class probabilities of logits (n, classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats of probabilities (..., classes)."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """The share of generated images inside a real ball, and of real images inside a generated one (arXiv 1904.06991).

    An image's ball reaches to its k-th nearest neighbour in its own set, and includes its border.

    Raises:
      ConfigError: no more than k images, features that are not finite, or of two networks.
    """
    precise, recalled = inside_balls(generated, real, k)
    return float(precise.mean()), float(recalled.mean())


def inside_balls(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Which generated images are inside a real ball, (n,) bool, and which real ones inside a generated ball, (m,) bool.

    Goes over pairs of blocks: memory is bounded by the features' own. Errors as in `precision_recall`.
    """
    if k < 1:
        raise ConfigError(f"precision and recall with the k={k}-th neighbour: k must be 1 or more.")
    x = validate_features(generated, "generated", at_least=k + 1, needed_for=f"balls to the {k}-th neighbour")
    y = validate_features(real, "real", at_least=k + 1, needed_for=f"balls to the {k}-th neighbour")
    check_same_features(x, y)
    centre = y.mean(axis=0, dtype=np.float64)  # distances of what is far from the origin would lose digits
    reach_x, reach_y = _knn_squared_radius(x - centre, k), _knn_squared_radius(y - centre, k)
    in_y, in_x = np.zeros(len(x), bool), np.zeros(len(y), bool)
    for i in row_slices(len(x)):
        for j in row_slices(len(y)):
            squares = squared_distances(x[i] - centre, y[j] - centre, allowance=RELATIVE_TIE_TOLERANCE)
            in_y[i] |= (squares <= reach_y[j]).any(axis=1)
            in_x[j] |= (squares <= reach_x[i, None]).any(axis=0)
    return in_y, in_x


def squared_distances(x: np.ndarray, y: np.ndarray, allowance: float = 0.0) -> np.ndarray:
    """Squared Euclidean distances of each of (n, d) to each of (m, d): (n, m).

    A matrix product rounds the same pair differently at different places; `allowance`, relative to the squared norms,
    is taken off, so that what is equal stays so for `<=`: a neighbour that two sets share is on the border of a ball.
    """
    sums = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("nd,nd->n", y, y)
    return (1 - allowance) * sums - 2 * (x @ y.T)


def _knn_squared_radius(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each of (n, d) to its k-th nearest neighbour: (n,)."""
    nearest = np.full((len(x), k), np.inf)
    for i in row_slices(len(x)):
        for j in row_slices(len(x)):
            squares = squared_distances(x[i], x[j])
            if i == j:
                np.fill_diagonal(squares, np.inf)  # itself
            nearest[i] = np.partition(np.concatenate([nearest[i], squares], axis=1), k - 1, axis=1)[:, :k]
    return nearest.max(axis=1)


def row_slices(n: int) -> list[slice]:
    """Slices that cut n images into parts of `BLOCK`."""
    return [slice(start, min(start + TILE_ROWS, n)) for start in range(0, n, TILE_ROWS)]


def _as_gaussian(features: np.ndarray | Gaussian, what: str) -> Gaussian:
    return features if isinstance(features, Gaussian) else Gaussian.of(features, what)


def validate_features(features: np.ndarray, what: str, at_least: int, needed_for: str) -> np.ndarray:
    """Features (n, d) as an array.

    Raises:
      ConfigError: they are no matrix, not finite or less than `at_least`; `what` and `needed_for` go into the message.
    """
    x = np.asarray(features)
    if x.ndim != 2 or not x.shape[1]:
        raise ConfigError(f"{what} features have shape {x.shape}: they must be (images, features).")
    if len(x) < at_least:
        raise ConfigError(f"{len(x)} {what} images are too few for {needed_for}: give {at_least} or more.")
    broken = int(len(x) - np.isfinite(x).all(axis=1).sum())
    if broken:
        raise ConfigError(f"{what} features of {broken} of {len(x)} images are not finite: look at images and weights.")
    return x


def check_same_features(x: np.ndarray, y: np.ndarray) -> None:
    """Raises ConfigError when generated (n, d) and real (m, d) features are of networks of different sizes."""
    if x.shape[1] != y.shape[1]:
        raise ConfigError(
            f"generated images have {x.shape[1]} features, real ones {y.shape[1]}: they are of different networks."
        )
