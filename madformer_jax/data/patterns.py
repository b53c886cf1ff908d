"""Sources `patterns:texture`, `patterns:mirror` and `patterns:palette`: pictures with known structure.

They show whether the samples of a model reproduce local structure, or structure that connects distant parts:

  texture   a two-color texture: only neighboring pixels depend on each other
  mirror    the same, and the right half mirrors the left one
  palette   the same, and each picture has two random colors of its own

`Patterns.inconsistency` measures how far pictures break the structure. It is 0 for every real picture.
The class is the scale of the texture. Picture i depends on its number and on its size alone.
"""

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.data.source import Examples, Source, fingerprint
from madformer_jax.errors import ConfigError

KINDS = ("texture", "mirror", "palette")
PICTURES = 20_000  # of all splits
SCALES = {"fine": 1.0, "coarse": 2.0}  # class -> standard deviation of the texture's Gaussian filter, pixels
MARGIN = 8  # pixels that are filtered and cut off, so that opposite edges are independent
CELLS = 4  # rows and columns of the parts whose colors `palette_distance` compares
COLORS = ((40, 60, 110), (230, 190, 120))  # dark and bright, except for "palette"


class Patterns(Source):
    """Color pictures of one kind. Every second picture has a coarse texture."""

    takes_name = True
    names = tuple(SCALES)

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Patterns":
        if name not in KINDS:
            raise ConfigError(
                f"config.data.source={data.source!r} is unknown: one of {', '.join(f'patterns:{x}' for x in KINDS)}."
            )
        if data.image_size % (2 * CELLS):
            raise ConfigError(
                f"config.data.image_size={data.image_size} is not a multiple of {2 * CELLS}, as patterns need."
            )
        return cls(name, data.image_size)

    def __init__(self, kind: str, size: int) -> None:
        """Describes pictures of a kind with size x size pixels, a multiple of 8."""
        self._kind, self._size = kind, size
        self.fingerprint = fingerprint([f"patterns {kind} {size} {PICTURES}"])

    def __len__(self) -> int:
        return PICTURES

    def read(self, indices: np.ndarray) -> Examples:
        images = np.empty((len(indices), self._size, self._size, 3), np.uint8)
        for image, index in zip(images, indices):
            image[:] = draw(self._kind, self._size, int(index))
        return Examples({"image": images}, (indices % len(SCALES)).astype(np.int32))

    def name(self, index: int) -> str:
        return f"{self._kind} {index}"

    @classmethod
    def inconsistency(cls, name: str, images: np.ndarray) -> np.ndarray | None:
        """Returns distances (n,) in levels of gray; None for "texture", which has no such structure."""
        if name == "mirror":
            half = images.shape[2] // 2
            left, right = images[:, :, :half].astype(float), images[:, :, half:].astype(float)
            return np.abs(left - right[:, :, ::-1]).mean((1, 2, 3))
        return palette_distance(images) if name == "palette" else None


def draw(kind: str, size: int, number: int) -> np.ndarray:
    """Draws a picture, uint8 (size, size, 3)."""
    random = np.random.default_rng([KINDS.index(kind), number])
    width = size // 2 if kind == "mirror" else size
    noise = random.standard_normal((size + MARGIN, width + MARGIN))
    is_bright = _filter(noise, list(SCALES.values())[number % len(SCALES)])[:size, :width] > 0
    if kind == "mirror":
        is_bright = np.concatenate([is_bright, is_bright[:, ::-1]], axis=1)
    colors = np.array(COLORS)
    if kind == "palette":
        colors = np.stack([random.integers(0, 100, 3), random.integers(156, 256, 3)])
    return colors[is_bright.astype(int)].astype(np.uint8)


def _filter(noise: np.ndarray, deviation: float) -> np.ndarray:
    """Filters noise (h, w) with a Gaussian on a torus."""
    frequencies = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, noise.shape), indexing="ij"))
    gain = np.exp(-2 * (np.pi * deviation * frequencies) ** 2)
    return np.fft.ifft2(np.fft.fft2(noise) * gain).real


def palette_distance(images: np.ndarray) -> np.ndarray:
    """Computes how much the dark color and the bright color differ between 4 x 4 parts of a picture.

    A pixel is bright if the mean of its channels is at least 128.

    Args:
      images: uint8 (n, H, W, c).

    Returns:
      The mean absolute distance between a part's mean color and the picture's, (n,). Parts without
      a dark or bright pixel do not count for that color.
    """
    n, height, width, channels = images.shape
    cells = images.reshape(n, CELLS, height // CELLS, CELLS, width // CELLS, channels).swapaxes(2, 3)
    cells = cells.reshape(n, CELLS**2, -1, channels).astype(float)
    is_bright = cells.mean(-1) >= 128
    distances = []
    for chosen in (is_bright, ~is_bright):
        count = chosen.sum(2)
        sums = (cells * chosen[..., None]).sum(2)
        mean = sums / np.maximum(count, 1)[..., None]
        whole = sums.sum(1) / np.maximum(count.sum(1), 1)[:, None]
        difference = np.abs(mean - whole[:, None]).mean(-1) * (count > 0)
        distances.append(difference.sum(1) / np.maximum((count > 0).sum(1), 1))
    return np.mean(distances, axis=0)
