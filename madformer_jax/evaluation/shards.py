"""Per-image features of a set of images, in shards on disk, extracted by all processes.

`modes.evaluate` and `modes.reference` use it. Each process extracts a slice of each shard, and the
first process writes the shard. A killed run continues at the first missing shard. Memory holds one
batch of images. `exclusive_lock` keeps two jobs from working on the same folder. `extract_features`
determines the arrays of a shard; add further per-image arrays there.
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import seams
from madformer_jax.evaluation.networks.registry import NetworkOutputs
from madformer_jax.runtime import lock, progress, storage

Arrays = dict[str, np.ndarray]
T = TypeVar("T")

MAX_BATCH = 256  # images of a shard: a kill loses at most their features
POLL_SECONDS = 2.0  # interval at which `exclusive_lock` tries to get the lock
UNREADABLE_KEY = "unread"  # array with a text line for each unreadable image


class Shard(NamedTuple):
    """Images [first, stop) of a set."""

    first: int
    stop: int

    @property
    def n(self) -> int:
        return self.stop - self.first


class Shards:
    """The shards of n images in a folder, one file each. Every process has the same object."""

    def __init__(self, folder: epath.Path, n: int, size: int):
        """Divides n images into shards of `size` images."""
        self._folder = folder
        self._shards = [Shard(first, min(first + size, n)) for first in range(0, n, size)]

    def missing(self) -> list[Shard]:
        """Returns the shards without a valid file, as the first process sees them.

        A shard with unreadable images counts as missing, because the images may have been repaired.
        """
        complete = np.array([jax.process_index() == 0 and self._is_complete(shard) for shard in self._shards])
        complete = multihost_utils.broadcast_one_to_all(complete) if jax.process_count() > 1 else complete
        return [shard for shard, is_complete in zip(self._shards, complete) if not is_complete]

    def write(self, shard: Shard, arrays: Arrays) -> None:
        """Writes the arrays of a shard. Only the first process writes."""
        if jax.process_index() == 0:
            storage.write(self._path(shard), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def iterate(self) -> Iterator[Arrays]:
        """Yields the arrays of each shard, in order.

        Raises:
          ConfigError: A shard is damaged.
        """
        for shard in self._shards:
            path = self._path(shard)
            try:
                yield _parse_npz(path.read_bytes())
            except Exception as error:  # A damaged archive raises many types of errors.
                raise ConfigError(f"{path} is damaged: run again ({type(error).__name__}).") from None

    def read(self) -> Arrays:
        """Returns the arrays of all shards, concatenated in order.

        Raises:
          ConfigError: A shard is damaged.
        """
        collected: dict[str, list[np.ndarray]] = {}
        for arrays in self.iterate():
            for name, array in arrays.items():
                collected.setdefault(name, []).append(array)
        return {name: np.concatenate(arrays) for name, arrays in collected.items()}

    def remove(self) -> None:
        """Removes the shards and their folder. Call it after the result is written."""
        if jax.process_index() == 0 and self._folder.exists():
            for path in self._folder.iterdir():
                if lock.FILE_NAME not in path.name:
                    path.unlink(missing_ok=True)
            _remove_empty(self._folder)

    def _is_complete(self, shard: Shard) -> bool:
        path = self._path(shard)
        if not path.exists():
            return False
        content = path.read_bytes()
        try:
            return not _parse_npz(content).get(UNREADABLE_KEY, np.zeros(0)).size
        except Exception as error:  # A damaged archive raises many types of errors.
            logging.warning("%s is damaged (%s) and is computed again", path, type(error).__name__)
            return False

    def _path(self, shard: Shard) -> epath.Path:
        return self._folder / f"part_{shard.first:07d}_{shard.stop:07d}.npz"


@contextlib.contextmanager
def exclusive_lock(folder: epath.Path) -> Iterator[None]:
    """Locks a folder of shards for this job. Waits while another job holds the lock.

    Raises:
      ConfigError: The folder cannot be written.
    """
    try:
        with contextlib.ExitStack() as stack:
            with progress.log_while(f"waiting for another process, which works on {folder}"):
                while True:
                    try:
                        stack.enter_context(lock.acquire(str(folder)))
                        break
                    except lock.LockedError:
                        time.sleep(POLL_SECONDS)
            yield
    finally:
        if jax.process_index() == 0:
            _remove_empty(folder)


def _remove_empty(folder: epath.Path) -> None:
    """Removes a local folder if it is empty. Buckets have no folders."""
    if not storage.is_remote(folder):
        with contextlib.suppress(OSError):
            # `epath.Path.rmdir` would also remove files that another job writes meanwhile.
            os.rmdir(folder)


def _parse_npz(content: bytes) -> Arrays:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_batch_size(c: ConfigDict) -> int:
    """Returns the number of images to read at a time: 64 MiB of pixels, at most `MAX_BATCH`."""
    return max(1, min(MAX_BATCH, 2**26 // (c.data.image_size**2 * c.data.channels)))


def process_slice(n: int) -> slice:
    """Returns the slice of n rows that this process handles."""
    index, count = jax.process_index(), jax.process_count()
    return slice(n * index // count, n * (index + 1) // count)


def allgather_rows(arrays: Arrays) -> Arrays:
    """Concatenates each array over all processes, in their order. Numbers of rows may differ."""
    if jax.process_count() == 1:
        return arrays
    rows = len(next(iter(arrays.values())))
    counts = multihost_utils.process_allgather(np.array(rows))
    max_rows = int(counts.max())
    out = {}
    for name, array in arrays.items():
        padded = np.pad(array, [(0, max_rows - rows)] + [(0, 0)] * (array.ndim - 1))
        # JAX would convert float64 to float32, so the arrays are exchanged as bytes.
        gathered_bytes = multihost_utils.process_allgather(np.frombuffer(padded.tobytes(), np.uint8))
        gathered_bytes = gathered_bytes.reshape(-1).tobytes()
        gathered = np.frombuffer(gathered_bytes, array.dtype).reshape(len(counts), max_rows, *array.shape[1:])
        out[name] = np.concatenate([x[:count] for x, count in zip(gathered, counts)])
    return out


def read_json_object(path: storage.Path, *needed: str) -> dict[str, Any] | None:
    """Reads a JSON file in the first process and returns its object in every process.

    Other processes may see another state of the file, for example on a network file system.
    `storage.read_json_object` has the arguments and errors.
    """
    if jax.process_count() == 1:
        return storage.read_json_object(path, *needed)
    outcome: str | ConfigError = ""
    if jax.process_index() == 0:
        try:
            outcome = json.dumps(storage.read_json_object(path, *needed))
        except ConfigError as error:
            outcome = error
    text = np.frombuffer(sync_errors(outcome).encode(), np.uint8)
    content: dict[str, Any] | None = json.loads(allgather_rows({"text": text})["text"].tobytes())
    return content


def sync_errors(outcome: T | ConfigError) -> T:
    """Returns `outcome`, or raises in every process if it is an error in any process.

    If only one process raised, the others would wait forever at the next collective.

    Raises:
      ConfigError: This process's error, or the first error of another process.
    """
    error = outcome if isinstance(outcome, ConfigError) else None
    text = f"{error}\n".encode("utf-8", "surrogateescape") if error else b""
    lines = allgather_rows({"errors": np.frombuffer(text, np.uint8)})["errors"].tobytes()
    if lines:
        raise error or ConfigError(lines.decode("utf-8", "surrogateescape").splitlines()[0])
    assert not isinstance(outcome, ConfigError)
    return outcome


def extract_features(extract: Callable[[np.ndarray], NetworkOutputs], images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Computes the arrays of a shard from its images.

    Args:
      extract: Computes a network's outputs, see `registry.make_extractor`.
      images: Images uint8 (n, H, W, c). n is 0 if this process has no slice of the shard.
      labels: Their classes (n,).

    Returns:
      `features` (n, d), `profile` of `seams.difference_profiles`, `labels` (n,), `logits` (n, classes)
      if the network has classes, and `embedding` (n, e) and `inconsistency` (n,) if `extract` computes
      them.
    """
    if not len(images):
        # The shapes of the empty arrays come from a dummy image.
        dummy = extract_features(extract, np.zeros((1, *images.shape[1:]), images.dtype), np.zeros(1, np.int32))
        return {name: array[:0] for name, array in dummy.items()}
    outputs = extract(images)
    arrays = {
        "features": outputs.features,
        "profile": seams.difference_profiles(images),
        "labels": labels.astype(np.int32),
    }
    optional = {name: getattr(outputs, name) for name in ("logits", "embedding", "inconsistency")}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yields the items. A thread computes the next item while the caller uses the current one."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item
