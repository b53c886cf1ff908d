"""Checkpoint files of other frameworks as plain numpy: safe reading, atomic writing, the check that all tensors fit.

Formats by suffix: .pt, .pth and .bin (PyTorch, an optional extra), .safetensors, .npz. A file holds one state_dict
(name -> tensor) or, as the release writes it, two under "model" and "ema" beside the training arguments "args".
"""

import argparse
import importlib
import io
import json
import os
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")
_ARGS_KEY = "args"  # where .safetensors (metadata) and .npz (an entry) keep the arguments, as JSON


class StateDict(NamedTuple):
    """What a checkpoint file holds for one model."""

    tensors: dict[str, np.ndarray]
    args: dict[str, Any] | None  # the release's training arguments
    weights: str  # which set of weights was taken: "ema", "model", or "" where the file holds just one


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts, by their names from the top, joined by dots."""
    return {".".join(path): x for path, x in flatten_dict(tree).items()}


def unflatten(tensors: Mapping[str, np.ndarray], shapes: Any, what: str) -> Any:
    """What `by_name` made flat, compared with a tree of `shapes` first; see `check_tensors` for `what` and the errors."""
    check_tensors({name: x.shape for name, x in flatten(shapes).items()}, tensors, what)
    return unflatten_dict({tuple(name.split(".")): x for name, x in tensors.items()})


def check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray], what: str) -> None:
    """Checks that `given` holds exactly the tensors of `expected`; `what` names the file or the model in the error.

    Raises:
      ConfigError: names every missing, extra and mis-shaped tensor.
    """
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshaped = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names)})"
        for kind, names in (
            ("missing", missing),
            ("extra", extra),
            ("mis-shaped", misshaped),
        )
        if names
    ]
    if faults:
        raise ConfigError(f"{what}: the tensors do not fit the model: {'; '.join(faults)}.")


def read_state_dict(path: str | os.PathLike[str], weights: str = "") -> StateDict:
    """Reads one state_dict; no code in the file is ever run, and large .pt files are mapped rather than loaded.

    Args:
      path: a file with one of `SUFFIXES`.
      weights: "ema" or "model" where the file holds both; "" takes the EMA where there is one.

    Raises:
      ConfigError: no such file, truncated or of another kind, not only tensors and plain values in it, no such weights.
    """
    if storage.is_remote(path):
        raise ConfigError(
            f"{path}: checkpoints of other frameworks are read from this machine only: copy it here first."
        )
    path = pathlib.Path(path)
    readers: dict[str, Callable[[pathlib.Path], dict[str, Any]]] = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
    }
    readers |= dict.fromkeys(TORCH_SUFFIXES, _read_torch)
    _check_suffix(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.")
    content = readers[path.suffix](path)
    args = content.pop(_ARGS_KEY, None)
    sets = {name: content[name] for name in ("ema", "model") if isinstance(content.get(name), dict)}
    if not sets:
        return StateDict(_plain_arrays(content, path), args, "")
    chosen = weights or next(iter(sets))
    if chosen not in sets:
        raise ConfigError(f"{path} holds no {chosen!r} weights, only {', '.join(map(repr, sets))}.")
    return StateDict(_plain_arrays(sets[chosen], path), args, chosen)


def read_npz(path: storage.Path) -> StateDict:
    """What `write_state_dict` has written as .npz, be it in a bucket: small enough to be read into memory.

    Raises:
      ConfigError: no such file, truncated or of another kind.
    """
    there = epath.Path(path)
    with storage.wrap_errors(f"{path} cannot be read"):
        try:
            content = storage.retry(there.read_bytes)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file.") from None
    tensors = _read_npz(there, io.BytesIO(content))
    args = tensors.pop(_ARGS_KEY, None)
    return StateDict(_plain_arrays(tensors, there), args, "")


def write_state_dict(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    args: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state_dict in the format of the suffix; the file appears whole or not at all.

    With `args`, a .pt file has the release's layout {"model": ..., "args": ...}.

    Raises:
      ConfigError: unknown suffix, or PyTorch is missing for a PyTorch file.
    """
    suffix = epath.Path(path).suffix
    _check_suffix(epath.Path(path))
    # safetensors writes the memory behind a strided array as if it were contiguous
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}

    def put(file: IO[bytes]) -> None:
        if suffix == ".npz":
            entries = {} if args is None else {_ARGS_KEY: np.array(json.dumps(dict(args)))}
            everything: dict[str, Any] = arrays | entries
            np.savez(file, **everything)
        elif suffix == ".safetensors":
            metadata = {"format": "pt"} | ({} if args is None else {_ARGS_KEY: json.dumps(dict(args))})
            safetensors.numpy.save_file(arrays, file.name, metadata=metadata)
        else:
            _write_torch(file, path, arrays, args)

    with storage.wrap_errors(f"{path} cannot be written"):
        storage.write(path, put)


def save_params(folder: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Writes a tree of arrays as an Orbax checkpoint with checksums in `folder`/params; an older one is replaced."""
    import orbax.checkpoint as ocp  # slow to import, and only networks that are not trained are kept this way

    from madformer_jax.runtime import checksums

    storage.check_arrays_path(folder, write=True)
    handler = checksums.with_checksums(ocp.StandardCheckpointHandler())
    with storage.wrap_errors(f"{folder} cannot be written"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(_params_path(folder), args=ocp.args.StandardSave(dict(params)), force=True)


def load_params(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree of numpy arrays written by `save_params`, its checksums compared first.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    import orbax.checkpoint as ocp

    from madformer_jax.runtime import checksums

    if not has_params(folder):
        raise ConfigError(f"{folder}: no params folder in it; --mode=convert writes one.")
    path = _params_path(folder)
    storage.check_arrays_path(folder, write=False)
    with storage.wrap_errors(f"{folder} cannot be read"):
        try:
            if not checksums.verify_files(path):
                logging.info("%s was written before there were checksums: it is taken as it is", path)
        except checksums.DamagedError as error:
            raise ConfigError(f"{folder} is damaged: {error}; make it again with --mode=convert.") from None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path)
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own
        raise _unreadable_error(pathlib.Path(folder), "an Orbax checkpoint", error) from None


def has_params(folder: str | os.PathLike[str]) -> bool:
    """Whether `save_params` has written to `folder`."""
    return _params_path(folder).exists()


def _params_path(folder: str | os.PathLike[str]) -> epath.Path:
    return storage.absolute(folder) / "params"


def _check_suffix(path: pathlib.PurePath) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: unknown kind of checkpoint, the name must end in one of {', '.join(SUFFIXES)}.")


def _plain_arrays(content: Mapping[str, Any], path: pathlib.PurePath) -> dict[str, np.ndarray]:
    arrays = {str(name): _to_numpy(value) for name, value in content.items()}
    wrong = [name for name, array in arrays.items() if array is None]
    if wrong or not arrays:
        raise ConfigError(f"{path} holds no state_dict: {', '.join(wrong[:8]) or 'nothing at all'} is no tensor.")
    return {name: array for name, array in arrays.items() if array is not None}


def _to_numpy(value: Any) -> np.ndarray | None:
    """A numpy array or a torch tensor as numpy array, sharing memory; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    if value.dtype == torch.bfloat16:
        return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.detach().numpy()


def _unreadable_error(path: pathlib.PurePath, kind: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ConfigError(f"{path} cannot be read as {kind}; it is truncated or another kind of file ({reason}).")


def _read_npz(path: pathlib.PurePath, archive: IO[bytes] | None = None) -> dict[str, Any]:
    try:
        with np.load(archive or path, allow_pickle=False) as file:
            content: dict[str, Any] = {name: _restore_bfloat16(file[name]) for name in file.files}
        return content | {_ARGS_KEY: json.loads(str(content[_ARGS_KEY]))} if _ARGS_KEY in content else content
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise _unreadable_error(path, "a .npz archive", error) from None


def _restore_bfloat16(array: np.ndarray) -> np.ndarray:
    """Numpy stores a bfloat16 array as two-byte voids."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "np") as file:
            names, metadata = file.keys(), file.metadata() or {}
            content: dict[str, Any] = {name: file.get_tensor(name) for name in names}
        return content | {_ARGS_KEY: json.loads(metadata[_ARGS_KEY])} if _ARGS_KEY in metadata else content
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise _unreadable_error(path, "a .safetensors file", error) from None


def _import_torch(path: str | os.PathLike[str]) -> ModuleType:
    try:
        return importlib.import_module("torch")  # an optional extra
    except ImportError:
        raise ConfigError(
            f"{path}: this format needs PyTorch: pip install torch, or store the tensors as .safetensors."
        ) from None


def _read_torch(path: pathlib.Path) -> dict[str, Any]:
    torch = _import_torch(path)
    try:
        # Namespace is the one class beyond tensors and plain values: the release keeps its arguments in one
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path) or None,
            )
    except Exception as error:  # a broken pickle raises almost any kind
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ConfigError(
                f"{path} was not loaded: it holds {refused[1]}, and only tensors and plain values are accepted."
            ) from None
        raise _unreadable_error(path, "a PyTorch checkpoint", error) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, no state_dict.")
    if isinstance(content.get(_ARGS_KEY), argparse.Namespace):
        content[_ARGS_KEY] = vars(content[_ARGS_KEY])
    return content


def _write_torch(
    file: IO[bytes],
    path: str | os.PathLike[str],
    arrays: dict[str, np.ndarray],
    args: Mapping[str, Any] | None,
) -> None:
    torch = _import_torch(path)

    def tensor_of(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)

    model = {name: tensor_of(array) for name, array in arrays.items()}
    torch.save(
        model if args is None else {"model": model, _ARGS_KEY: argparse.Namespace(**args)},
        file,
    )
