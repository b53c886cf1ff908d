"""Degradations of real images, to test which of them a score detects.

`images.open_images` applies the degradation that `evaluate.degrade` names. A new degradation is a function
and an entry in `_DEGRADATIONS`.
"""

from collections.abc import Callable

import numpy as np
from PIL import ImageFilter

from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError

BLOCKS = 4  # rows and columns of blocks of "blocks"

# Maps images uint8 (n, H, W, c) and their numbers (n,) to degraded images.
Degradation = Callable[[np.ndarray, np.ndarray], np.ndarray]


def parse(degradation: str) -> Degradation:
    """Returns the degradation that a text names.

    Args:
      degradation: "noise:16" adds noise of standard deviation 16 of 255. "blur:1.5" blurs with a
        radius of 1.5 pixels. "blocks:8" makes each of 4 x 4 blocks brighter or darker by 8.

    Raises:
      ConfigError: The text has another form.
    """
    kind, _, text = degradation.partition(":")
    try:
        strength = float(text)
    except ValueError:
        strength = -1
    if kind not in _DEGRADATIONS or not 0 < strength < np.inf:
        raise ConfigError(
            f"config.evaluate.degrade={degradation!r}: it must be noise:DEVIATION, blur:RADIUS or blocks:OFFSET, as in "
            "noise:16."
        )
    return lambda images, numbers: _DEGRADATIONS[kind](images, numbers, strength)


def _blur(images: np.ndarray, numbers: np.ndarray, strength: float) -> np.ndarray:
    blur = ImageFilter.GaussianBlur(strength)
    return np.stack([np.asarray(preprocess.to_pil(x).filter(blur)) for x in images]).reshape(images.shape)


def _add_noise(images: np.ndarray, numbers: np.ndarray, strength: float) -> np.ndarray:
    noise = [np.random.default_rng(int(n)).normal(0, strength, images.shape[1:]) for n in numbers]
    return _add(images, np.stack(noise))


def _offset_blocks(images: np.ndarray, numbers: np.ndarray, strength: float) -> np.ndarray:
    rows, columns = (np.arange(side) * BLOCKS // side for side in images.shape[1:3])
    signs = np.stack([np.random.default_rng(int(n)).choice((-1, 1), (BLOCKS, BLOCKS)) for n in numbers])
    return _add(images, strength * signs[:, rows][:, :, columns, None])


def _add(images: np.ndarray, change: np.ndarray) -> np.ndarray:
    return np.clip(np.round(images + change), 0, 255).astype(np.uint8)


_DEGRADATIONS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "blur": _blur,
    "noise": _add_noise,
    "blocks": _offset_blocks,
}
