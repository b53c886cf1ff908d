"""Prepared data: ArrayRecord shards of images or VAE latents, and the manifest that vouches for them.

A record is its arrays' raw bytes, one after the other in the layout of `dtype`, then the caption as UTF-8: reading one
is `np.frombuffer`. Shards hold one record a chunk (group_size:1), uncompressed: noise-like float16 does not compress,
and reading at random would pay for it (figures in docs/data.md). `--mode=prepare` writes them (`prepare.py`).
"""

import collections
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from ml_collections import ConfigDict

from madformer_jax.data import preprocess
from madformer_jax.data.source import Examples, Source, fingerprint
from madformer_jax.errors import ConfigError

FORMAT = 1  # of the manifest and the records
MANIFEST = "manifest.json"
MAX_OPEN = 400  # shards that a process holds open: many systems allow it 1024 files. Reading goes on with more, slower


class Shard(NamedTuple):
    """One finished shard, as its own JSON file and the manifest tell of it."""

    file: str  # "" if every image of it was skipped
    records: int
    size: int  # bytes
    sha256: str
    shape: list[int]  # of a record's arrays
    skipped: Any  # name and reason of each; in the manifest, their number


def dtype(kind: str, shape: tuple[int, ...]) -> np.dtype:
    """Layout of a record: label, then "image" uint8 or "mean" and "logvar" float16, each of `shape`."""
    if kind == "images":
        return np.dtype([("label", "<i4"), ("image", "u1", shape)])
    return np.dtype([("label", "<i4"), ("mean", "<f2", shape), ("logvar", "<f2", shape)])


def writer(path: str) -> ArrayRecordWriter:
    """A writer of shards; `write` takes the bytes of a record, `close` ends the file."""
    return ArrayRecordWriter(path, "group_size:1,uncompressed")


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """What a writer raises, as the OSError that it is: a full disk shows at any `write`, or not before `close`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition("\n")[0]) from None


def sha256(path: str) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str, content: Any, process: int = 0) -> None:
    """Writes a whole file or none, even if the machine stops or other processes write the same."""
    part = f"{path}.{process}.part"
    with open(part, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Makes the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def manifest(folder: str) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      ConfigError: there is none (not prepared, or not finished), or it is not ours.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder!r} holds no {MANIFEST}: make the records with --mode=prepare, or run it again if it was stopped."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if content.get("format") != FORMAT:
        raise ConfigError(f"{path} is of format {content.get('format')}, not {FORMAT}: prepare the data again.")
    return content


def is_whole(path: str, shard: Shard, checksum: bool = False) -> bool:
    """Whether the file of a shard is there with its size and, if asked for, its checksum."""
    if not os.path.exists(path) or os.path.getsize(path) != shard.size:
        return False
    return not checksum or sha256(path) == shard.sha256


def _shards(content: Mapping[str, Any]) -> list[Shard]:
    return [shard for shard in (Shard(**entry) for entry in content["shards"]) if shard.records]


class _Readers:
    """Open shards, for several threads.

    A reader that seeks and then reads takes a third of the time of one that is given the positions: that one hands them
    to threads of its own.
    """

    def __init__(self, paths: list[str]):
        self._paths, self._lock = paths, threading.Lock()
        self._open: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()

    def read(self, shards: list[int], positions: list[int]) -> list[bytes]:
        with self._lock:
            return [self._read(shard, position) for shard, position in zip(shards, positions)]

    def _read(self, shard: int, position: int) -> bytes:
        try:
            if shard not in self._open:
                self._open[shard] = ArrayRecordReader(
                    self._paths[shard], "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
                )
            reader = self._open[shard]
            self._open.move_to_end(shard)
            reader.seek(position)
            record = reader.read()
        except Exception as error:  # ArrayRecord raises its status as whatever Python type fits
            raise ConfigError(
                f"{self._paths[shard]} is damaged at record {position} ({error}): --mode=prepare on its folder mends it."
            ) from None
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return record


class Records(Source):
    """Random access to a prepared folder (source `arrayrecord`), a batch at a time."""

    manifest: Mapping[str, Any]

    def __init__(self, folder: str):
        """Reads the manifest and checks that the shards are there with their sizes.

        Raises:
          ConfigError: no manifest, or a shard is missing or of another size.
        """
        self.manifest = content = manifest(folder)
        self.kind = content["kind"]
        self.classes = content["classes"]
        self.names = tuple(str(label) for label in range(self.classes))
        self.fingerprint = _fingerprint(content)
        shards = _shards(content)
        self._paths = [os.path.join(folder, shard.file) for shard in shards]
        for path, shard in zip(self._paths, shards):
            if not is_whole(path, shard):
                raise ConfigError(
                    f"{path} is missing or not {shard.size} bytes long: copy it again, or run --mode=prepare again."
                )
        self._ends = np.cumsum([shard.records for shard in shards])
        self._dtype = dtype(self.kind, tuple(content["shape"]))
        self._readers = _Readers(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = _Readers(self._paths)  # each process opens its own

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._paths[shard]} record {index - (self._ends[shard - 1] if shard else 0)}"

    def read(self, indices: np.ndarray) -> Examples:
        """The records with these numbers; arrays are strided.

        Raises:
          ConfigError: names a shard that is damaged.
        """
        size = self._dtype.itemsize  # what follows it is the caption
        found = self._bytes(indices)
        rows = np.frombuffer(bytearray().join([record[:size] for record in found]), self._dtype)
        # Views of one buffer: an array for each field would double the time, nearly all of it in page faults.
        arrays = {name: rows[name] for name in self._dtype.names or ()}
        return Examples(arrays, arrays.pop("label"), [record[size:].decode() for record in found])

    def _bytes(self, indices: np.ndarray) -> list[bytes]:
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return self._readers.read(shards.tolist(), (indices - starts[shards]).tolist())


def _fingerprint(content: Mapping[str, Any]) -> str:
    """Of what decides which records there are; a shard that was made anew may differ in its last bits."""
    kept = {name: value for name, value in content.items() if name not in ("shards", "skipped")}
    return fingerprint([json.dumps(kept, sort_keys=True), *(str(shard.records) for shard in _shards(content))])


def check(made: Mapping[str, Any], config: ConfigDict, table: preprocess.Table) -> None:
    """Compares the manifest of prepared records with the config that is about to train on them.

    Raises:
      ConfigError: they were prepared in another way than `config` wants them.
    """
    wanted, was = table.describe(), made["image"]
    for field, value in was.items():  # an older manifest has fewer
        if wanted.get(field) != value:
            name = {"size": "image_size"}.get(field, field)
            raise ConfigError(
                f"config.data.{name}={wanted.get(field)!r}, but the records of config.data.path={config.data.path!r} "
                f"were prepared with {value!r}: set the same, or prepare again."
            )
    if made["kind"] == "images":
        return
    if config.codec.name != "vae":
        raise ConfigError(
            f"config.codec.name={config.codec.name!r}: the records of {config.data.path!r} are VAE latents."
        )
    if config.data.flip:
        raise ConfigError(
            "config.data.flip=True: latents cannot be flipped; use --mode=prepare --config.prepare.flip=True."
        )
    encoder = made["codec"]
    if encoder["path"] != config.codec.path:
        logging.warning(
            "the latents were made with codec.path=%r and the config has %r: they must be the same VAE.",
            encoder["path"], config.codec.path,
        )  # fmt: skip
