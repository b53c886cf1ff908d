"""Checksums of the files of a checkpoint's items, for `runtime.checkpoint`.

They are written into the folder of an item before Orbax marks the step as finished, so that a finished
step always has them.
"""

import errno
import json
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from madformer_jax.runtime import storage

FILE_NAME = "checksums.json"
_COMMIT_METADATA = "_CHECKPOINT_METADATA"  # Orbax writes the time of its commit to it later
_HEADER = b"/.zarray"  # ends the key of an array's shape and type
_THREADS = 4  # hashing does not hold the interpreter's lock
Handler = TypeVar("Handler", bound=ocp.CheckpointHandler)
Verify = Callable[[epath.Path], None]  # of the folder of an item that has been written


class DamagedError(Exception):
    """A file is missing or its content has changed."""


def with_checksums(handler: Handler, verify: Verify | None = None) -> Handler:
    """Makes a handler add checksums to each item that it writes, in the background, in process 0.

    The handler is patched because Orbax looks arguments up by its exact type, so that a subclass would
    have to repeat its registrations.

    Args:
      handler: Handler of one item.
      verify: Reads the item back before it gets its checksums. The step does not count as finished if this raises.
    """
    finalize = handler.finalize

    def finalize_and_sum(directory: epath.Path) -> None:
        finalize(directory)
        if verify is not None:
            verify(directory)
        names = _list_files(directory)
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            sums = dict(zip(names, pool.map(lambda name: storage.sha256(directory / name), names)))
        storage.write_json(directory / FILE_NAME, {"sha256": sums})

    handler.finalize = finalize_and_sum
    return handler


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the arrays of a tree."""
    return {name: tuple(x.shape) for name, x in ocp.tree.to_flat_dict(tree, sep=".", keep_empty_nodes=False).items()}


def verify_arrays(directory: epath.Path, shapes: dict[str, tuple[int, ...]] | None) -> None:
    """Checks names and shapes of all arrays of an item that has just been written, by reading their headers.

    One listing and one batch of reads take a tenth of the time of opening each array.

    Raises:
      OSError: An array is missing or has another shape.
      ValueError: TensorStore cannot read a header.
    """
    if shapes is None:
        return
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": storage.kvstore(directory)}).result()
    keys = [key for key in store.list().result() if key.endswith(_HEADER)]
    reads = [store.read(key) for key in keys]
    stored = {key.removesuffix(_HEADER).decode(): json.loads(read.result().value) for key, read in zip(keys, reads)}
    if {name: tuple(header["shape"]) for name, header in stored.items()} != shapes:
        raise OSError(errno.EIO, "the arrays that were written cannot be read back", str(directory))


def verify_files(folder: epath.Path, share: int = 0, shares: int = 1) -> None:
    """Compares the files of an item with their checksums.

    Errors of the file system are raised after some retries.

    Args:
      folder: Folder of the item.
      share: Number of the share of the files to compare.
      shares: Number of shares, one for each process.

    Raises:
      DamagedError: A file or the checksums are missing, or a file has changed.
    """
    called = f"{folder.parent.name}/{folder.name}"
    try:
        text = storage.retry((folder / FILE_NAME).read_bytes)
    except FileNotFoundError:
        raise DamagedError(f"{called}/{FILE_NAME} is missing") from None
    try:
        expected: dict[str, str] = json.loads(text)["sha256"]
        names = sorted(expected)[share::shares]
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{called}/{FILE_NAME} is damaged") from None

    def compare(name: str) -> None:
        try:
            actual = storage.retry(lambda: storage.sha256(folder / name))
        except FileNotFoundError:
            raise DamagedError(f"{called}/{name} is missing") from None
        if actual != expected[name]:
            raise DamagedError(f"{called}/{name} is not what was written (its checksum differs)")

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(compare, names):
            pass


def _list_files(folder: epath.Path) -> list[str]:
    """Returns the names of all files below a folder. TensorStore lists a bucket in one request."""
    store = tensorstore.KvStore.open(storage.kvstore(folder)).result()
    names = [key.decode() for key in store.list().result()]
    # In a bucket, folders may be objects, and "" is this folder.
    return sorted(name for name in names if name not in ("", _COMMIT_METADATA) and not name.endswith("/"))
