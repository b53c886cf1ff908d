"""Inception's weights: the checkpoints of the original's PyTorch ports and Orbax folders of ours."""

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
    """Parameters from the original's checkpoint file (see `files.SUFFIXES`) or a folder written by `save`.

    Raises:
      ConfigError: there is none at `path`, or its tensors do not fit.
    """
    if epath.Path(path).is_dir():
        params = state_dicts.load_params(path)
        state_dicts.check_tensors(shapes(), to_torch(params), path)
        return params
    return from_torch(state_dicts.read_state_dict(path).tensors, path)


def save(folder: str, source: str) -> None:
    """Writes the parameters of `source` (as for `load`) as an Orbax folder.

    Raises:
      ConfigError: as for `load`; nothing is written then.
    """
    state_dicts.save_params(folder, load(source))


_BATCH_COUNT = "num_batches_tracked"  # of training; says nothing about the network, and the published file lacks it


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch checkpoints."""
    found = {_torch_name(path): tensor_layout.torch_shape(leaf.shape) for path, leaf in _abstract_params().items()}
    return found | {_batch_count_name(path): () for path in _abstract_params() if path[-1] == "running_var"}


def from_torch(state_dict: Mapping[str, np.ndarray], what: str = "Inception") -> dict[str, Any]:
    """Parameters (float32 numpy) from a PyTorch state_dict.

    Raises:
      ConfigError: names every tensor that is missing, left over or mis-shaped; `what` names the file there.
    """
    expected = shapes()
    counts = {name: np.zeros(()) for name in expected if name.endswith(_BATCH_COUNT)}
    state_dicts.check_tensors(expected, counts | dict(state_dict), what)
    flat = {
        path: tensor_layout.from_torch(np.asarray(state_dict[_torch_name(path)], np.float32))
        for path in _abstract_params()
    }
    return unflatten_dict(flat)


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The PyTorch state_dict of parameters; the inverse of `from_torch`."""
    state_dict = {}
    for path, leaf in flatten_dict(params).items():
        state_dict[_torch_name(path)] = tensor_layout.to_torch(np.asarray(leaf))
        if path[-1] == "running_var":
            state_dict[_batch_count_name(path)] = np.zeros((), np.int64)
    return state_dict


@functools.lru_cache(maxsize=1)  # tracing the network takes seconds
def _abstract_params() -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    return flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])


def _batch_count_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], _BATCH_COUNT))


def _torch_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], "weight" if path[-1] == "kernel" else path[-1]))
