"""Seams between blocks: what block-wise generation can do wrong, and what no distance of features shows."""

import numpy as np


def profile(images: np.ndarray) -> np.ndarray:
    """How much neighbouring pixels differ on the two sides of each line through the image.

    Args:
      images: (n, H, W, c), any type of number.

    Returns:
      (n, H - 1 + W - 1) float32: mean absolute difference across each horizontal line, then across each vertical one.
    """
    return np.stack([_profile(image.astype(np.float32)) for image in images])  # floats of one large image at a time


def _profile(image: np.ndarray) -> np.ndarray:
    down, right = np.abs(np.diff(image, axis=0)).mean(axis=(1, 2)), np.abs(np.diff(image, axis=1)).mean(axis=(0, 2))
    return np.concatenate([down, right])


def steps_at_borders(profiles: np.ndarray, shape: tuple[int, int], rows: int, columns: int) -> np.ndarray:
    """The steps across borders of blocks and inside blocks.

    Args:
      profiles: (n, H - 1 + W - 1), of `profile`.
      shape: (H, W).
      rows, columns: of blocks in an image; together at least three.

    Returns:
      (n, 2) float64: mean absolute difference of neighbours on two sides of a border, and in one block, of each image.
    """
    lines = [np.arange(1, side) for side in shape]
    border = np.concatenate([line % (side // parts) == 0 for line, side, parts in zip(lines, shape, (rows, columns))])
    pairs = np.repeat([shape[1], shape[0]], [len(line) for line in lines])  # of pixels on a line
    return np.stack([np.average(profiles[:, x], axis=1, weights=pairs[x]) for x in (border, ~border)], axis=1)


def seam_score(steps: np.ndarray) -> float:
    """Mean step across borders over mean step inside blocks, of `steps_at_borders` (n, 2): about 1 without seams.

    Images without any step have no seam either: 1; with steps at borders only it is infinite.
    """
    across, inside = np.mean(steps, axis=0)
    if not inside:
        return float("inf") if across else 1.0
    return float(across / inside)
