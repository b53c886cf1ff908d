"""Checkpoint files of other frameworks as numpy arrays: safe reading, atomic writing, checks.

`modes/convert.py`, `modes/export.py` and the networks of the evaluation use it. Formats by suffix
are .pt, .pth and .bin (PyTorch, an optional extra), .safetensors and .npz. A file holds one
state_dict (name -> tensor). Files of the release hold "model", "ema" and the training arguments
"args". A new format needs a reader in `read_state_dict`, a writer in `write_state_dict` and its
suffix in `SUFFIXES`.

`save_params` and `load_params` store parameters of networks that are not trained as Orbax
checkpoints.
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
from collections.abc import Mapping
from types import ModuleType
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")
_ARGS_KEY = "args"  # key of the arguments; as JSON in the metadata of .safetensors and in an entry of .npz


class StateDict(NamedTuple):
    """Content of a checkpoint file for one model."""

    tensors: dict[str, np.ndarray]
    args: dict[str, Any] | None  # the release's training arguments
    weights: str  # set of weights that was read: "ema", "model", or "" if the file holds only one


def flatten(tree: Any) -> dict[str, Any]:
    """Flattens nested dicts. Keys are joined by dots."""
    return {".".join(path): x for path, x in flatten_dict(tree).items()}


def unflatten(tensors: Mapping[str, np.ndarray], shapes: Any, origin: str) -> Any:
    """Restores nested dicts from the result of `flatten`, after checking the tensors.

    Args:
      tensors: Arrays by joined key.
      shapes: Tree of the expected shapes.
      origin: Name of the file or the model, for messages.

    Raises:
      ConfigError: The tensors do not fit (see `check_tensors`).
    """
    check_tensors({name: x.shape for name, x in flatten(shapes).items()}, tensors, origin)
    return unflatten_dict({tuple(name.split(".")): x for name, x in tensors.items()})


def check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], origin: str) -> None:
    """Checks that `tensors` has exactly the names and shapes of `expected`.

    Args:
      expected: Name -> shape.
      tensors: Name -> array.
      origin: Name of the file or the model, for messages.

    Raises:
      ConfigError: A tensor is missing, unexpected or mis-shaped. The message names each.
    """
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names)})"
        for kind, names in (("missing", missing), ("extra", extra), ("mis-shaped", misshaped))
        if names
    ]
    if faults:
        raise ConfigError(f"{origin}: the tensors do not fit the model: {'; '.join(faults)}.")


def read_state_dict(path: str | os.PathLike[str], weights: str = "") -> StateDict:
    """Reads one state_dict. Code in the file is never run, and large .pt files are memory-mapped.

    Args:
      path: A file with one of `SUFFIXES`; in a bucket, an .npz file.
      weights: "ema" or "model" to choose between the two sets of a file; "" prefers the EMA.

    Raises:
      ConfigError: The file does not exist, is truncated or of another kind, holds objects other
        than tensors and plain values, or lacks the chosen weights.
    """
    file, archive = epath.Path(path), None
    if storage.is_remote(path) and file.suffix != ".npz":
        raise ConfigError(
            f"{path}: checkpoints of other frameworks are read from this machine only: copy it here first."
        )
    _check_suffix(file)
    with storage.wrap_errors(f"{path} cannot be read"):
        if not storage.retry(file.is_file):
            raise ConfigError(f"{path}: no such file.")
        if storage.is_remote(path):
            archive = io.BytesIO(storage.retry(file.read_bytes))
    if file.suffix == ".npz":
        content = _read_npz(file, archive)
    else:
        content = (_read_safetensors if file.suffix == ".safetensors" else _read_torch)(pathlib.Path(path))
    args = content.pop(_ARGS_KEY, None)
    if not isinstance(args, dict | None):
        raise ConfigError(f"{path}: {_ARGS_KEY!r} is of type {type(args).__name__}, not a dict of training arguments.")
    sets = {name: content[name] for name in ("ema", "model") if isinstance(content.get(name), dict)}
    chosen = weights or next(iter(sets), "")
    if chosen and chosen not in sets:
        others = ", ".join(map(repr, sets)) or "one set without a name: leave config.convert.weights empty"
        raise ConfigError(f"{path} holds no {chosen!r} weights, only {others}.")
    return StateDict(_plain_arrays(sets[chosen] if chosen else content, file), args, chosen)


def write_state_dict(
    path: storage.Path, tensors: Mapping[str, np.ndarray], args: Mapping[str, Any] | None = None
) -> None:
    """Writes a state_dict atomically, in the format of the suffix.

    Args:
      path: A file with one of `SUFFIXES`.
      tensors: Name -> array.
      args: Training arguments. With them a .pt file has the release's layout
        {"model": ..., "args": ...}.

    Raises:
      ConfigError: The suffix is unknown, or a PyTorch file is requested and PyTorch is not
        installed.
    """
    suffix = epath.Path(path).suffix
    _check_suffix(epath.Path(path))
    # safetensors writes the memory of a strided array as if it were contiguous.
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}

    def put(file: IO[bytes]) -> None:
        if suffix == ".npz":
            entries: dict[str, Any] = {} if args is None else {_ARGS_KEY: np.array(json.dumps(dict(args)))}
            np.savez(file, **(arrays | entries))
        elif suffix == ".safetensors":
            metadata = {"format": "pt"} | ({} if args is None else {_ARGS_KEY: json.dumps(dict(args))})
            safetensors.numpy.save_file(arrays, file.name, metadata=metadata)
        else:
            _write_torch(file, path, arrays, args)

    with storage.wrap_errors(f"{path} cannot be written"):
        storage.write(path, put)


def save_params(folder: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Writes a tree of arrays to `folder`/params as an Orbax checkpoint with checksums.

    An older checkpoint is replaced.
    """
    import orbax.checkpoint as ocp  # slow to import, and rarely needed

    from madformer_jax.runtime import checksums

    storage.check_arrays_path(folder, write=True)
    handler = checksums.with_checksums(ocp.StandardCheckpointHandler())
    with storage.wrap_errors(f"{folder} cannot be written"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(_params_path(folder), args=ocp.args.StandardSave(dict(params)), force=True)


def load_params(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the tree of numpy arrays written by `save_params`, after verifying its checksums.

    Raises:
      ConfigError: The checkpoint does not exist or is damaged.
    """
    import orbax.checkpoint as ocp

    from madformer_jax.runtime import checksums

    if not has_params(folder):
        raise ConfigError(f"{folder} has no folder params: write it with --mode=convert.")
    path = _params_path(folder)
    storage.check_arrays_path(folder, write=False)
    with storage.wrap_errors(f"{folder} cannot be read"):
        try:
            checksums.verify_files(path)
        except checksums.DamagedError as error:
            raise ConfigError(f"{folder} is damaged: {error}; make it again with --mode=convert.") from None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path)
    except Exception as error:  # Orbax, TensorStore and JSON raise their own types
        raise _unreadable_error(epath.Path(folder), "an Orbax checkpoint", error) from None


def has_params(folder: str | os.PathLike[str]) -> bool:
    """Returns whether `save_params` has written to `folder`."""
    return _params_path(folder).exists()


def _params_path(folder: str | os.PathLike[str]) -> epath.Path:
    return storage.absolute(folder) / "params"


def _check_suffix(path: pathlib.PurePath) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: unknown kind of checkpoint, the name must end in one of {', '.join(SUFFIXES)}.")


def _plain_arrays(content: Mapping[str, Any], path: pathlib.PurePath) -> dict[str, np.ndarray]:
    arrays = {str(name): _to_numpy(value) for name, value in content.items()}
    others = [name for name, array in arrays.items() if array is None]
    if others:
        raise ConfigError(
            f"{path} holds no state_dict: these entries are not tensors of a NumPy type: {', '.join(others[:8])}."
        )
    if not arrays:
        raise ConfigError(f"{path} holds no state_dict: it is empty.")
    return {name: array for name, array in arrays.items() if array is not None}


def _to_numpy(value: Any) -> np.ndarray | None:
    """Converts a torch tensor to a numpy array that shares its memory; None for what NumPy cannot hold."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    try:
        if value.dtype == torch.bfloat16:
            return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.detach().numpy()
    except (TypeError, RuntimeError):  # such as float8, quantized and sparse tensors
        return None


def _unreadable_error(path: pathlib.PurePath, kind: str, error: Exception) -> ConfigError:
    reason = first_line(error)[:200]
    return ConfigError(f"{path} cannot be read as {kind}; it is truncated or another kind of file ({reason}).")


def _read_npz(path: pathlib.PurePath, archive: IO[bytes] | None = None) -> dict[str, Any]:
    try:
        with np.load(archive or path, allow_pickle=False) as file:
            content: dict[str, Any] = {name: _restore_bfloat16(file[name]) for name in file.files}
        return content | {_ARGS_KEY: json.loads(str(content[_ARGS_KEY]))} if _ARGS_KEY in content else content
    except Exception as error:  # NumPy, zipfile and zlib raise their own types
        raise _unreadable_error(path, "a .npz archive", error) from None


def _restore_bfloat16(array: np.ndarray) -> np.ndarray:
    """Restores a bfloat16 array, which numpy stores as two-byte voids."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "np") as file:
            names, metadata = file.keys(), file.metadata() or {}
            content: dict[str, Any] = {name: file.get_tensor(name) for name in names}
        return content | {_ARGS_KEY: json.loads(metadata[_ARGS_KEY])} if _ARGS_KEY in metadata else content
    except (safetensors.SafetensorError, ValueError, OSError, AttributeError) as error:  # NumPy has no float8
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
        # The release stores its arguments in a Namespace. Other classes are refused.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # a broken pickle raises almost any type
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ConfigError(
                f"{path} was not loaded: it holds {refused[1]}, and only tensors and plain values are accepted."
            ) from None
        raise _unreadable_error(path, "a PyTorch checkpoint", error) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no state_dict but an object of type {type(content).__name__}.")
    if isinstance(content.get(_ARGS_KEY), argparse.Namespace):
        content[_ARGS_KEY] = vars(content[_ARGS_KEY])
    return content


def _write_torch(
    file: IO[bytes], path: storage.Path, arrays: dict[str, np.ndarray], args: Mapping[str, Any] | None
) -> None:
    torch = _import_torch(path)

    def to_tensor(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)

    model = {name: to_tensor(array) for name, array in arrays.items()}
    torch.save(model if args is None else {"model": model, _ARGS_KEY: argparse.Namespace(**args)}, file)
