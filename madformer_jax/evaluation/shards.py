"""What is found out of many images, in parts on disk: a killed run goes on, and memory holds one batch of images.

Every process takes its share of each part; the first one writes it. Only what is small per image is kept. One job at a time
works on a folder of parts: see `alone`.
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

MAX_BATCH = 256  # small images of a part: what a kill loses at most
POLL_SECONDS = 2.0  # seconds between two looks whether a folder is free
UNREADABLE_KEY = "unread"  # the array that tells, as text, of images that cannot be read


class Shard(NamedTuple):
    """Images [first, stop) of a set."""

    first: int
    stop: int

    @property
    def n(self) -> int:
        return self.stop - self.first


class Shards:
    """The parts of n images in a folder of files; the same in every process."""

    def __init__(self, folder: epath.Path, n: int, size: int):
        self._folder = folder
        self._parts = [Shard(first, min(first + size, n)) for first in range(0, n, size)]

    def missing(self) -> list[Shard]:
        """The parts that are not there yet, damaged, or lack images, which may be mended now; as the first process sees them."""
        there = np.array([jax.process_index() == 0 and self._whole(part) for part in self._parts])
        there = multihost_utils.broadcast_one_to_all(there) if jax.process_count() > 1 else there
        return [part for part, found in zip(self._parts, there) if not found]

    def write(self, part: Shard, arrays: Arrays) -> None:
        """Writes what was found in a part."""
        if jax.process_index() == 0:
            storage.write(self._path(part), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def each(self) -> Iterator[Arrays]:
        """All parts in order, one in memory at a time.

        Raises:
          ConfigError: a part is damaged.
        """
        for part in self._parts:
            path = self._path(part)
            try:
                yield _parse_npz(path.read_bytes())
            except Exception as error:  # a broken archive raises almost any kind
                raise ConfigError(f"{path} is damaged: run again ({type(error).__name__}).") from None

    def read(self) -> Arrays:
        """All parts, each array with their rows in order. Errors as in `each`."""
        found: dict[str, list[np.ndarray]] = {}
        for arrays in self.each():
            for name, array in arrays.items():
                found.setdefault(name, []).append(array)
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def remove(self) -> None:
        """Removes the parts, once what they were for is written."""
        if jax.process_index() == 0 and self._folder.exists():
            for path in self._folder.iterdir():
                if lock.FILE_NAME not in path.name:
                    path.unlink(missing_ok=True)
            _remove_empty(self._folder)

    def _whole(self, part: Shard) -> bool:
        path = self._path(part)
        if not path.exists():
            return False
        content = path.read_bytes()
        try:
            return not _parse_npz(content).get(UNREADABLE_KEY, np.zeros(0)).size
        except Exception as error:  # a broken archive raises almost any kind
            logging.warning("%s is damaged (%s): done again", path, type(error).__name__)
            return False

    def _path(self, part: Shard) -> epath.Path:
        return self._folder / f"part_{part.first:07d}_{part.stop:07d}.npz"


@contextlib.contextmanager
def exclusive_lock(folder: epath.Path) -> Iterator[None]:
    """Holds a folder of parts, for all processes of this job. Waits while another job holds it.

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
    """Removes a folder unless something is in it. A bucket has no folders."""
    if not storage.is_remote(folder):
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # that of epath removes what comes into the folder meanwhile


def _parse_npz(content: bytes) -> Arrays:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_batch_size(c: ConfigDict) -> int:
    """Images of a part that are read together: 64 MiB of pixels, and no more than `AT_ONCE`."""
    return max(1, min(MAX_BATCH, 2**26 // (c.data.image_size**2 * c.data.channels)))


def process_slice(n: int) -> slice:
    """The run of n rows that falls to this process."""
    index, count = jax.process_index(), jax.process_count()
    return slice(n * index // count, n * (index + 1) // count)


def allgather_rows(arrays: Arrays) -> Arrays:
    """All processes' rows of each array, in the order of the processes; their numbers of rows may differ."""
    if jax.process_count() == 1:
        return arrays
    rows = len(next(iter(arrays.values())))
    counts = multihost_utils.process_allgather(np.array(rows))
    most = int(counts.max())
    out = {}
    for name, array in arrays.items():
        padded = np.pad(array, [(0, most - rows)] + [(0, 0)] * (array.ndim - 1))
        # as bytes: JAX would make float32 of float64
        every = multihost_utils.process_allgather(np.frombuffer(padded.tobytes(), np.uint8))
        every = every.reshape(-1).tobytes()
        whole = np.frombuffer(every, array.dtype).reshape(len(counts), most, *array.shape[1:])
        out[name] = np.concatenate([x[:count] for x, count in zip(whole, counts)])
    return out


def read_json(path: storage.Path) -> Any:
    """Returns `storage.read_json` of the first process to every process: the others may see another state of the file.

    Raises:
      ConfigError: As `storage.read_json`.
    """
    if jax.process_count() == 1:
        return storage.read_json(path)
    outcome: str | ConfigError = ""
    if jax.process_index() == 0:
        try:
            outcome = json.dumps(storage.read_json(path))
        except ConfigError as error:
            outcome = error
    text = np.frombuffer(sync_errors(outcome).encode(), np.uint8)
    return json.loads(allgather_rows({"text": text})["text"].tobytes())


def sync_errors(outcome: T | ConfigError) -> T:
    """Returns what this process has found, unless it or another process has an error instead.

    A process that raised alone would leave the others waiting in their next exchange.

    Raises:
      ConfigError: The first error, in every process.
    """
    error = outcome if isinstance(outcome, ConfigError) else None
    text = f"{error}\n".encode("utf-8", "surrogateescape") if error else b""
    lines = allgather_rows({"errors": np.frombuffer(text, np.uint8)})["errors"].tobytes()
    if lines:
        raise error or ConfigError(lines.decode("utf-8", "surrogateescape").splitlines()[0])
    assert not isinstance(outcome, ConfigError)
    return outcome


def extract_features(extract: Callable[[np.ndarray], NetworkOutputs], images: np.ndarray, labels: np.ndarray) -> Arrays:
    """What is kept of images uint8 (n, H, W, c) and their labels (n,)."""
    if not len(images):  # of a process without a share, or of files that cannot be read
        one = extract_features(extract, np.zeros((1, *images.shape[1:]), images.dtype), np.zeros(1, np.int32))
        return {name: array[:0] for name, array in one.items()}
    outputs = extract(images)
    found = {
        "features": outputs.features,
        "profile": seams.difference_profiles(images),
        "labels": labels.astype(np.int32),
    }
    return found if outputs.logits is None else {**found, "logits": outputs.logits}


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the last is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = pool.submit(next, items, end)
            yield item
