"""Weights of Inception-v3: PyTorch checkpoint files and Orbax folders.

`inception.Inception` opens the network with these weights. `modes.convert` converts a PyTorch
checkpoint to an Orbax folder.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax.evaluation.networks.inception_v3 import IMAGE_SIZE, InceptionV3, Params
from madformer_jax.weights import state_dicts, tensor_layout


def load(path: str) -> dict[str, Any]:
    """Loads parameters from a checkpoint file (see `state_dicts.SUFFIXES`) or a folder of `save`.

    Raises:
      ConfigError: The file or folder is missing, or its tensors do not fit.
    """
    if epath.Path(path).is_dir():
        params = state_dicts.load_params(path)
        state_dicts.check_tensors(shapes(), to_torch(params), path)
        return params
    return from_torch(state_dicts.read_state_dict(path).tensors, path)


def save(folder: str, source: str) -> None:
    """Writes the parameters of `source`, a file or folder as in `load`, to an Orbax folder.

    Raises:
      ConfigError: `load` fails. Nothing is written in that case.
    """
    state_dicts.save_params(folder, load(source))


# A training counter that inference ignores. The published file lacks it.
_BATCH_COUNT = "num_batches_tracked"


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors of a PyTorch checkpoint."""
    names = {_torch_name(path): tensor_layout.torch_shape(leaf.shape) for path, leaf in _abstract_params().items()}
    return names | {_batch_count_name(path): () for path in _abstract_params() if path[-1] == "running_var"}


def from_torch(state_dict: Mapping[str, np.ndarray], description: str = "Inception") -> dict[str, Any]:
    """Converts a PyTorch state_dict to parameters, float32 NumPy arrays.

    Raises:
      ConfigError: Tensors are missing, unexpected or of the wrong shape. The message names `description` and
        each of them.
    """
    expected = shapes()
    counts = {name: np.zeros(()) for name in expected if name.endswith(_BATCH_COUNT)}
    state_dicts.check_tensors(expected, counts | dict(state_dict), description)
    flat = {
        path: tensor_layout.from_torch(np.asarray(state_dict[_torch_name(path)], np.float32))
        for path in _abstract_params()
    }
    return unflatten_dict(flat)


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """Converts parameters to a PyTorch state_dict; the inverse of `from_torch`."""
    state_dict = {}
    for path, leaf in flatten_dict(params).items():
        state_dict[_torch_name(path)] = tensor_layout.to_torch(np.asarray(leaf))
        if path[-1] == "running_var":
            state_dict[_batch_count_name(path)] = np.zeros((), np.int64)
    return state_dict


@functools.lru_cache(maxsize=1)  # Tracing the network takes seconds.
def _abstract_params() -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    return flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])


def _batch_count_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], _BATCH_COUNT))


def _torch_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], "weight" if path[-1] == "kernel" else path[-1]))
