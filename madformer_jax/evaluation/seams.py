"""Seams between blocks: what block-wise generation can do wrong, and what no distance of features shows."""

import numpy as np

from madformer_jax.evaluation import scores


def difference_profiles(images: np.ndarray) -> np.ndarray:
    """How much neighbouring pixels differ on the two sides of each line through the image.

    Args:
      images: uint8 (n, H, W, c).

    Returns:
      (n, H - 1 + W - 1) float32: mean absolute difference across each horizontal line, then across each vertical one.
    """
    return np.stack([_difference_profile(image) for image in images])


def _difference_profile(image: np.ndarray) -> np.ndarray:
    """In integers, which takes a ninth of the time of floats and is exact."""
    height, width, channels = image.shape
    down = _absolute_differences(image[1:], image[:-1]).reshape(height - 1, -1).sum(axis=1, dtype=np.uint32)
    right = _absolute_differences(image[:, 1:], image[:, :-1]).reshape(height, -1).sum(axis=0, dtype=np.uint32)
    right = right.reshape(width - 1, channels).sum(axis=1)
    return np.concatenate([down / (width * channels), right / (height * channels)]).astype(np.float32)


def _absolute_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    steps = np.maximum(a, b)
    steps -= np.minimum(a, b)
    return steps


def border_and_interior_steps(profiles: np.ndarray, shape: tuple[int, int], rows: int, columns: int) -> np.ndarray:
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
    return float(scores.ratio(*np.mean(steps, axis=0)))
