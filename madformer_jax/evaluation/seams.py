"""Seams between blocks: what block-wise generation can do wrong, and what no distance of features shows."""

import numpy as np


def steps_at_borders(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How much neighbouring pixels differ across the borders of blocks, and inside blocks.

    Args:
      images: (n, H, W, c), any type of number.
      rows, columns: of blocks in an image; together at least two.

    Returns:
      (n, 2) float64: mean absolute difference of neighbours on two sides of a border, and in one block, of each image.
    """
    across, inside = [], []
    for axis, parts in ((1, rows), (2, columns)):
        side = images.shape[axis]
        first = np.arange(side - 1)
        border = (first + 1) % (side // parts) == 0
        x = np.moveaxis(images, axis, 1).reshape(len(images), side, -1).astype(np.float32)
        steps = np.abs(x[:, 1:] - x[:, :-1])
        across.append(steps[:, border].reshape(len(images), -1))
        inside.append(steps[:, ~border].reshape(len(images), -1))
    return np.stack([np.concatenate(x, axis=1).mean(axis=1, dtype=np.float64) for x in (across, inside)], axis=1)


def seam_score(steps: np.ndarray) -> float:
    """Mean step across borders over mean step inside blocks, of `steps_at_borders` (n, 2): about 1 without seams.

    Images without any step have no seam either: 1; with steps at borders only it is infinite.
    """
    across, inside = np.mean(steps, axis=0)
    if not inside:
        return float("inf") if across else 1.0
    return float(across / inside)
