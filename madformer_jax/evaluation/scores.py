"""Scores of generated images against real images, as pure functions of feature arrays.

`score_summary` calls them and adds the intervals of `bootstrap`. Values and conventions equal those of
torch-fidelity 0.4.0. Feature arrays are (n, d) of any float type; the computation is in float64,
tile by tile. A new score is a function here and an entry in `score_summary.compute_scores`.

| score | function | convention |
|---|---|---|
| FID, or FD on other features | `frechet` | Gaussians with covariances over n - 1, no epsilon |
| KID | `kernel_distance` | kernel (x.y / d + 1)^3, unbiased, over subsets |
| IS | `inception_score` | logits without bias, shuffled, over splits |
| precision, recall | `inside_balls` | balls up to the k-th neighbor (arXiv 1904.06991) |
"""

from typing import NamedTuple

import numpy as np

from madformer_jax.errors import ConfigError

TILE_ROWS = 2048  # rows and columns of the distance matrix that are in memory at a time
MAX_REUSE = 10  # up to this multiple of a subset, all kernel values are computed once for all subsets
RELATIVE_TIE_TOLERANCE = 1e-12  # of squared norms; larger than the rounding errors of float64


class Gaussian(NamedTuple):
    """Mean and covariance of features. The covariance (d, d) is `root.T @ root`."""

    mean: np.ndarray  # (d,)
    root: np.ndarray  # (r, d), where r is at most d and at most the number of images

    @classmethod
    def from_features(cls, features: np.ndarray, name: str = "images") -> "Gaussian":
        """Computes the Gaussian of features (n, d).

        Args:
          features: Features (n, d).
          name: Name of the set of images, for the error.

        Raises:
          ConfigError: There are less than two images, or features are not finite.
        """
        x = validate_features(features, name, minimum=2, purpose="a covariance")
        mean, d = x.mean(axis=0, dtype=np.float64), x.shape[1]
        if len(x) <= d:
            return cls(mean, (x - mean) / np.sqrt(len(x) - 1))
        centered = (x[rows] - mean for rows in row_slices(len(x)))
        return cls.from_covariance(mean, sum(((z.T @ z) for z in centered), np.zeros((d, d))) / (len(x) - 1), name)

    @classmethod
    def from_covariance(cls, mean: np.ndarray, covariance: np.ndarray, name: str = "statistics") -> "Gaussian":
        """Returns the Gaussian of a mean (d,) and a covariance (d, d), as in reference files.

        Args:
          mean: Mean (d,).
          covariance: Covariance (d, d).
          name: Name of the statistics, for the error.

        Raises:
          ConfigError: The shapes do not fit, or the matrix is not a covariance.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ConfigError(
                f"{name}: mean {mean.shape} and covariance {covariance.shape} do not fit: they must be (d,) and (d, d)."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ConfigError(f"{name}: mean or covariance is not finite: compute the statistics again.")
        size = np.abs(covariance).max(initial=0.0)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-3 * size or values.min(initial=0.0) < -1e-3 * size:
            raise ConfigError(
                f"{name}: the matrix is not a covariance (not symmetric, or with negative eigenvalues): "
                "compute the statistics again."
            )
        return cls(mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def frechet(generated: np.ndarray | Gaussian, real: np.ndarray | Gaussian) -> float:
    """Computes the Frechet distance of two Gaussians (FID, arXiv 1706.08500).

    The distance is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2). With S = R^T R the last trace is
    the sum of the singular values of R1 R2^T. This avoids the square root of a matrix, and for n <
    d images the problem is n x n.

    Args:
      generated: Features (n, d) of the generated images, or their Gaussian.
      real: The same of the real images.

    Raises:
      ConfigError: There are less than two images, features are not finite, or the numbers of
        features differ.
    """
    a, b = _as_gaussian(generated, "generated"), _as_gaussian(real, "real")
    check_same_features(a.root, b.root)
    cross = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    return float(max(0.0, np.sum((a.mean - b.mean) ** 2) + np.sum(a.root**2) + np.sum(b.root**2) - 2 * cross))


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Computes the unbiased squared kernel distance over subsets (KID, arXiv 1801.01401).

    Args:
      generated: Features (n, d) of the generated images.
      real: Features (m, d) of the real images.
      subsets: Number of subsets, each drawn without replacement.
      subset_size: Images of each set in a subset, at most n and m.
      seed: Seed of the subsets.

    Returns:
      The mean and the standard deviation over the subsets.

    Raises:
      ConfigError: There are less than two images, features are not finite, or the numbers of
        features differ.
    """
    x = validate_features(generated, "generated", minimum=2, purpose="the kernel distance")
    y = validate_features(real, "real", minimum=2, purpose="the kernel distance")
    check_same_features(x, y)
    size = min(subset_size, len(x), len(y))
    if size < 2 or subsets < 1:
        raise ConfigError(
            f"kernel distance over {subsets} subsets of {size}: it needs at least one subset of two images."
        )
    random = np.random.RandomState(seed)
    # The order of the random numbers is that of torch-fidelity.
    draws = [[random.choice(len(z), size, replace=False) for z in (x, y)] for _ in range(subsets)]
    if max(len(x), len(y)) <= MAX_REUSE * size:  # few kernel values serve many subsets
        members = [np.zeros((subsets, len(z))) for z in (x, y)]
        for i, rows in enumerate(draws):
            for member, row in zip(members, rows):
                member[i, row] = 1
        distances = weighted_kernel_distances(x, y, *members)
    else:
        subset_pairs = ((x[i].astype(np.float64), y[j].astype(np.float64)) for i, j in draws)
        distances = np.array([unbiased_kernel_distance(*pair) for pair in subset_pairs])
    return float(np.mean(distances)), float(np.std(distances))


def unbiased_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Computes the unbiased squared kernel distance of rows (n, d) and rows (m, d) float64, over all pairs."""
    within = sum((kernel(z, z).sum() - kernel_diagonal(z).sum()) / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(within - 2 * kernel(x, y).mean())


def weighted_kernel_distances(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes unbiased squared kernel distances (r,) of r resamples or subsets of two sets of images.

    Pairs of an image with itself or with its repetition are left out. Every kernel value is
    computed once, tile by tile.

    Args:
      x: Features (n, d).
      y: Features (m, d).
      a: Number of occurrences of each row of x (r, n).
      b: Number of occurrences of each row of y (r, m).
    """
    across = np.zeros(len(a))
    for i in row_slices(len(x)):
        rows = x[i].astype(np.float64)
        for j in row_slices(len(y)):
            across += np.sum(a[:, i] @ kernel(rows, y[j].astype(np.float64)) * b[:, j], axis=1)
    return _mean_pair_kernel(x, a) + _mean_pair_kernel(y, b) - 2 * across / (a.sum(axis=1) * b.sum(axis=1))


def _mean_pair_kernel(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Computes the mean kernel (r,) of pairs of different rows of x (n, d), with counts (r, n)."""
    total, tiles = np.zeros(len(counts)), row_slices(len(x))
    for first, i in enumerate(tiles):
        rows = x[i].astype(np.float64)
        for j in tiles[first:]:
            values = kernel(rows, x[j].astype(np.float64))
            if i == j:
                np.fill_diagonal(values, 0)
            total += (1 if i == j else 2) * np.sum(counts[:, i] @ values * counts[:, j], axis=1)
    pairs = counts.sum(axis=1) ** 2 - np.sum(counts**2, axis=1)
    return np.divide(total, pairs, out=np.zeros(len(counts)), where=pairs > 0)


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Computes the polynomial kernel of KID between rows (n, d) and rows (m, d): (n, m)."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # `base**3` is 20 times slower.


def kernel_diagonal(x: np.ndarray) -> np.ndarray:
    """Computes the diagonal of `kernel(x, x)`: (n,)."""
    return (np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Computes the inception score exp(mean KL(p(y|x) || p(y))) over splits (IS, arXiv 1606.03498).

    Args:
      logits: Logits (n, classes) without the bias of the last layer.
      splits: Number of splits of the shuffled images.
      seed: Seed of the shuffling.

    Returns:
      The mean and the standard deviation over the splits.

    Raises:
      ConfigError: There are fewer images than splits, or logits are not finite.
    """
    values = []
    for split in split_logits(logits, splits, seed):
        log_p = log_softmax(split)
        p = np.exp(log_p)
        values.append(np.exp(np.mean(np.sum(p * log_p, axis=1)) + entropy(p.mean(axis=0))))
    return float(np.mean(values)), float(np.std(values))


def split_logits(logits: np.ndarray, splits: int, seed: int) -> list[np.ndarray]:
    """Shuffles logits (n, classes) and splits them for the inception score.

    Raises:
      ConfigError: There are fewer images than splits, or logits are not finite.
    """
    x = validate_features(logits, "logits", minimum=max(1, splits), purpose=f"an inception score over {splits} splits")
    if splits < 1:
        raise ConfigError(f"inception score over {splits} splits: it needs at least one.")
    x = x[np.random.RandomState(seed).permutation(len(x))].astype(np.float64)
    return [x[i * len(x) // splits : (i + 1) * len(x) // splits] for i in range(splits)]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides arrays of nonnegative numbers: 0 / 0 is 1, and x / 0 is infinite."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.where(numerator > 0, np.inf, 1.0), where=denominator > 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Computes the logarithms of the class probabilities of logits (n, classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def entropy(p: np.ndarray) -> np.ndarray:
    """Computes the entropy, in nats, of probabilities (..., classes)."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def inside_balls(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Computes which images are inside a ball of the other set, for precision and recall (arXiv 1904.06991).

    Each image has a ball up to its k-th nearest neighbor in its own set. The ball includes its
    border. The mean of the first array is the precision, that of the second the recall. Memory
    holds the features and one tile of distances.

    Args:
      generated: Features (n, d) of the generated images.
      real: Features (m, d) of the real images.
      k: Rank of the neighbor.

    Returns:
      Whether each generated image is inside a ball of a real image, (n,) bool, and whether each
      real image is inside a ball of a generated image, (m,) bool.

    Raises:
      ConfigError: There are at most k images, features are not finite, or the numbers of features
        differ.
    """
    if k < 1:
        raise ConfigError(f"precision and recall with the k={k}-th neighbor: k must be 1 or more.")
    x = validate_features(generated, "generated", minimum=k + 1, purpose=f"balls to the {k}-th neighbor")
    y = validate_features(real, "real", minimum=k + 1, purpose=f"balls to the {k}-th neighbor")
    check_same_features(x, y)
    # Distances between points far from the origin lose digits.
    center = y.mean(axis=0, dtype=np.float64)
    radius_x, radius_y = _knn_squared_radius(x - center, k), _knn_squared_radius(y - center, k)
    in_y, in_x = np.zeros(len(x), bool), np.zeros(len(y), bool)
    for i in row_slices(len(x)):
        for j in row_slices(len(y)):
            distances = squared_distances(x[i] - center, y[j] - center, tolerance=RELATIVE_TIE_TOLERANCE)
            in_y[i] |= (distances <= radius_y[j]).any(axis=1)
            in_x[j] |= (distances <= radius_x[i, None]).any(axis=0)
    return in_y, in_x


def squared_distances(x: np.ndarray, y: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Computes the squared Euclidean distances between rows (n, d) and rows (m, d): (n, m).

    Args:
      x: Rows (n, d).
      y: Rows (m, d).
      tolerance: Subtracted from the distances, relative to the squared norms. A matrix product
        rounds equal distances differently. With a tolerance, points on the border of a ball stay
        inside it.
    """
    sums = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("nd,nd->n", y, y)
    return (1 - tolerance) * sums - 2 * (x @ y.T)


def _knn_squared_radius(x: np.ndarray, k: int) -> np.ndarray:
    """Computes the squared distance of each row (n, d) to its k-th nearest neighbor: (n,)."""
    nearest = np.full((len(x), k), np.inf)
    for i in row_slices(len(x)):
        for j in row_slices(len(x)):
            distances = squared_distances(x[i], x[j])
            if i == j:
                np.fill_diagonal(distances, np.inf)  # A row is not its own neighbor.
            nearest[i] = np.partition(np.concatenate([nearest[i], distances], axis=1), k - 1, axis=1)[:, :k]
    return nearest.max(axis=1)


def row_slices(n: int) -> list[slice]:
    """Returns slices of at most `TILE_ROWS` rows that cover n rows."""
    return [slice(start, min(start + TILE_ROWS, n)) for start in range(0, n, TILE_ROWS)]


def _as_gaussian(features: np.ndarray | Gaussian, name: str) -> Gaussian:
    return features if isinstance(features, Gaussian) else Gaussian.from_features(features, name)


def validate_features(features: np.ndarray, name: str, minimum: int, purpose: str) -> np.ndarray:
    """Checks features and returns them as an array (n, d).

    Args:
      features: Features (n, d).
      name: Name of the set of images, for the error.
      minimum: Smallest number of images.
      purpose: Name of the computation that needs so many images, for the error.

    Raises:
      ConfigError: The features are not a matrix, not finite, or less than `minimum`.
    """
    x = np.asarray(features)
    if x.ndim != 2 or not x.shape[1]:
        raise ConfigError(f"{name} features have shape {x.shape}: they must be (images, features).")
    if len(x) < minimum:
        raise ConfigError(f"{len(x)} {name} images are too few for {purpose}: give {minimum} or more.")
    not_finite = int(len(x) - np.isfinite(x).all(axis=1).sum())
    if not_finite:
        raise ConfigError(
            f"{name} features of {not_finite} of {len(x)} images are not finite: check the images and the network's weights."
        )
    return x


def check_same_features(x: np.ndarray, y: np.ndarray) -> None:
    """Checks that generated and real images have the same number of features.

    Raises:
      ConfigError: The numbers of features differ.
    """
    if x.shape[1] != y.shape[1]:
        raise ConfigError(
            f"generated images have {x.shape[1]} features, real ones {y.shape[1]}: they are of different networks."
        )
