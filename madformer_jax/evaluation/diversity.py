"""The diversity of images of one class: their mean pairwise distance, such as LPIPS.

`score_summary` computes the score `LPIPS-diversity` from vectors whose squared distances are LPIPS
(`networks.network.Network.embed`).
"""

import numpy as np


def mean_distances(vectors: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Computes the mean squared distance of pairs of one class, averaged over classes, in each replicate.

    Pairs of an image with itself or with its repetition are left out. Sums over classes give the sums
    over pairs, so no pair is visited.

    Args:
      vectors: Vectors (n, e).
      labels: Classes (n,).
      counts: Number of occurrences of each image in each replicate (r, n); all ones for the value itself.

    Returns:
      Means (r,) float64. Classes without a pair are left out, and NaN means that no class has one.
    """
    totals, classes = np.zeros(len(counts)), np.zeros(len(counts))
    for label in np.unique(labels):
        x = vectors[labels == label].astype(np.float64)
        weights = counts[:, labels == label]
        x -= x.mean(axis=0)  # sums of large vectors would lose digits
        size = weights.sum(axis=1)
        distances = 2 * (size * (weights @ np.sum(x**2, axis=1)) - np.sum((weights @ x) ** 2, axis=1))
        pairs = size**2 - np.sum(weights**2, axis=1)
        totals += np.divide(distances, pairs, out=np.zeros(len(counts)), where=pairs > 0)
        classes += pairs > 0
    return np.divide(totals, classes, out=np.full(len(counts), np.nan), where=classes > 0)
