"""The seam scores: how much more neighboring pixels differ across block borders than inside blocks.

Block-wise generation can leave visible seams that feature distances do not detect. `shards`
computes `difference_profiles` of each image, and `score_summary` computes two scores. One compares
the model's own block borders. The other compares the same lines for all models, also for one block.
"""

import numpy as np

from madformer_jax.evaluation import scores


def difference_profiles(images: np.ndarray) -> np.ndarray:
    """Computes the mean absolute difference of neighboring pixels across each line between pixels.

    Args:
      images: Images uint8 (n, H, W, c).

    Returns:
      Profiles (n, H - 1 + W - 1) float32: the differences across horizontal lines, then across
      vertical lines.
    """
    return np.stack([_difference_profile(image) for image in images])


def _difference_profile(image: np.ndarray) -> np.ndarray:
    """Computes the profile of one image. Integers are exact and 9 times faster than floats."""
    height, width, channels = image.shape
    down = _absolute_differences(image[1:], image[:-1]).reshape(height - 1, -1).sum(axis=1, dtype=np.uint32)
    right = _absolute_differences(image[:, 1:], image[:, :-1]).reshape(height, -1).sum(axis=0, dtype=np.uint32)
    right = right.reshape(width - 1, channels).sum(axis=1)
    return np.concatenate([down / (width * channels), right / (height * channels)]).astype(np.float32)


def _absolute_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = np.maximum(a, b)
    difference -= np.minimum(a, b)
    return difference


def border_and_interior_differences(
    profiles: np.ndarray, shape: tuple[int, int], rows: int, columns: int
) -> np.ndarray:
    """Computes mean absolute differences of neighboring pixels at block borders and elsewhere.

    Args:
      profiles: Profiles (n, H - 1 + W - 1) of `difference_profiles`.
      shape: Height and width (H, W) of an image.
      rows: Number of rows of blocks. `rows + columns` is at least 3, so that borders exist.
      columns: Number of columns of blocks, which are larger than a pixel.

    Returns:
      Differences (n, 2) float64 of each image: across borders, and inside blocks.
    """
    return _differences(profiles, shape, (shape[0] // rows, shape[1] // columns))


def line_and_other_differences(profiles: np.ndarray, shape: tuple[int, int], distance: int) -> np.ndarray | None:
    """Computes mean absolute differences of neighboring pixels across equidistant lines and elsewhere.

    Args:
      profiles: Profiles (n, H - 1 + W - 1) of `difference_profiles`.
      shape: Height and width (H, W) of an image.
      distance: Distance of the lines in pixels, at least 2.

    Returns:
      Differences (n, 2) float64 of each image: across lines, and elsewhere. None if the images are
      too small for a line.
    """
    return None if max(shape) <= distance else _differences(profiles, shape, (distance, distance))


def _differences(profiles: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    lines = [np.arange(1, side) for side in shape]
    border = np.concatenate([line % side == 0 for line, side in zip(lines, block)])
    # Number of pixel pairs across each line.
    pairs = np.repeat([shape[1], shape[0]], [len(line) for line in lines])
    return np.stack([np.average(profiles[:, x], axis=1, weights=pairs[x]) for x in (border, ~border)], axis=1)


def middle_differences(images: np.ndarray, rows: int, columns: int, axis: int) -> np.ndarray:
    """Computes mean absolute differences of neighboring pixels at the middle line and inside blocks.

    An edit that keeps half of a picture has its border there.

    Args:
      images: Images uint8 (n, H, W, c).
      rows: Rows of blocks.
      columns: Columns of blocks. Blocks tile each half.
      axis: 0 for the horizontal middle line, 1 for the vertical one.

    Returns:
      Differences (n, 2) float64 of each image: across the middle line, and inside blocks along the
      same axis.
    """
    height, side, count = images.shape[1], images.shape[1 + axis], (rows, columns)[axis]
    profiles = difference_profiles(images).astype(np.float64)
    profiles = profiles[:, height - 1 :] if axis else profiles[:, : height - 1]
    inside = np.arange(1, side) % (side // count) != 0
    return np.stack([profiles[:, side // 2 - 1], profiles[:, inside].mean(axis=1)], axis=1)


def seam_score(steps: np.ndarray) -> float:
    """Computes the mean difference at borders divided by the mean difference inside blocks.

    Args:
      steps: Differences (n, 2) of `border_and_interior_differences`.

    Returns:
      The score, about 1 without seams. It is 1 for constant images and infinite for differences at
      borders only.
    """
    return float(scores.ratio(*np.mean(steps, axis=0)))
