"""Prepared data: ArrayRecord shards of images or VAE latents, and their manifest.

`modes/prepare.py` writes the shards. `Records` reads them as source `arrayrecord`.

A record has the byte layout of `dtype`: label, attributes if the source has them, and arrays. The
caption follows as UTF-8. Shards are uncompressed and hold one record per chunk (group_size:1),
because float16 latents hardly compress and larger chunks slow random access (figures in
docs/data.md).

ArrayRecord stores a hash of every chunk and verifies it at each read. A changed byte in a record or
in the index of a shard therefore raises an error. The JSON files contain a hash of their content.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.data.source import Examples, Source, fingerprint
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import open_files, storage

FORMAT = 2  # format of the plan and the manifest
MANIFEST = "manifest.json"
MAX_OPEN = 400  # open shards per process, if the system allows it; further shards are reopened
# Mean seconds per record of a batch above which storage counts as slow. Local disks stay below it;
# mounted buckets do not.
SLOW_SECONDS_PER_RECORD = 1e-3
# Smaller data sets are compared with their SHA-256 sums at every start, in well under a second.
_MAX_CHECKSUM_BYTES = 1 << 28
_VAE_FACTS = ("scaling_factor", "shift_factor", "channels", "downsampling")  # keys of the manifest's codec
_COPY_THREADS = 8  # shards copied from a bucket at the same time


class Shard(NamedTuple):
    """A finished shard: its entry in the manifest and in its own JSON file."""

    file: str
    records: int  # 0 if every image of the shard was skipped
    size: int  # bytes
    sha256: str
    shape: list[int]  # of a record's arrays; [] for a shard without records
    skipped: Any  # names and reasons of skipped images; in the manifest, their number


def dtype(kind: str, shape: tuple[int, ...], attributes: int = 0) -> np.dtype:
    """Returns the layout of a record: label, attributes, then its arrays.

    Args:
      kind: "images" for the array "image" (uint8), "latents" for "mean" and "logvar" (float16).
      shape: Shape of each array.
      attributes: Number of attributes.
    """
    header = [("label", "<i4"), *([("attributes", "<i4", (attributes,))] if attributes else [])]
    arrays = [("image", "u1")] if kind == "images" else [("mean", "<f2"), ("logvar", "<f2")]
    return np.dtype([*header, *((name, scalar, shape) for name, scalar in arrays)])


# ---- writing


def open_writer(path: str) -> ArrayRecordWriter:
    """Opens a shard for writing. `write` takes the bytes of a record, `close` finishes the file."""
    return ArrayRecordWriter(path, "group_size:1,uncompressed")


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Converts the errors of a writer to OSError.

    A full disk may surface at `write` or only at `close`.
    """
    try:
        yield
    except RuntimeError as error:
        raise OSError(first_line(error)) from None


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(path: storage.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that contains a hash of its content."""
    storage.write_json(path, {**content, "seal": _seal(content)})


def read_sealed(path: storage.Path) -> dict[str, Any] | None:
    """Reads a JSON file written by `write_sealed`.

    Returns:
      Its content, or None if the file does not exist.

    Raises:
      ConfigError: The file cannot be read, or its content does not match its hash.
    """
    content = storage.read_json(path)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it does not contain a JSON object. Prepare the data again.")
    seal = content.pop("seal", None)
    if seal != _seal(content):
        raise ConfigError(f"{path} is damaged: its content does not match its hash. Prepare the data again.")
    return content


def is_complete(path: storage.Path, shard: Shard, checksum: bool = False) -> bool:
    """Returns whether the file of a shard exists with its size and, if asked, its checksum."""
    file = epath.Path(path)
    if not file.exists() or file.stat().length != shard.size:
        return False
    return not checksum or storage.sha256(path) == shard.sha256


# ---- reading


def read_manifest(folder: str) -> dict[str, Any]:
    """Reads the manifest of a prepared folder.

    Raises:
      ConfigError: The manifest does not exist because preparation did not run or did not finish, it
        is damaged, or its format is unknown.
    """
    path = epath.Path(folder) / MANIFEST
    content = read_sealed(path)
    if content is None:
        raise ConfigError(
            f"config.data.path={str(folder)!r} holds no {MANIFEST}: make the records with --mode=prepare, or run it again if "
            "it was stopped."
        )
    if content.get("format") != FORMAT:
        raise ConfigError(f"{path} is of format {content.get('format')}, not {FORMAT}: prepare the data again.")
    return content


def _shards(content: Mapping[str, Any]) -> list[Shard]:
    return [shard for shard in (Shard(**entry) for entry in content["shards"]) if shard.records]


def _download_shards(folder: str, content: Mapping[str, Any]) -> str:
    """Copies the missing shards of a bucket to the user's cache, and returns the local folder."""
    local = os.path.join(storage.user_cache("records"), _seal(content)[:32])
    with storage.wrap_errors(f"{folder} cannot be copied to {local}"):
        os.makedirs(local, exist_ok=True)
        with open(os.path.join(local, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process on this machine may be copying
            missing = [s for s in _shards(content) if not is_complete(os.path.join(local, s.file), s)]
            size, free = sum(shard.size for shard in missing), shutil.disk_usage(local).free
            if size > free:
                raise ConfigError(
                    f"{folder}: its shards need {size / 1e9:.1f} GB in {local}, where {free / 1e9:.1f} GB are free: "
                    "let XDG_CACHE_HOME name a folder of a larger disk, or mount the bucket."
                )
            if missing:
                logging.info("copying %d shards, %.1f GB, of %s to %s", len(missing), size / 1e9, folder, local)
            with ThreadPoolExecutor(_COPY_THREADS) as threads:
                list(threads.map(lambda shard: storage.retry(lambda: _copy_shard(folder, local, shard)), missing))
    return local


def _copy_shard(folder: str, local: str, shard: Shard) -> None:
    def put(file: IO[bytes]) -> None:
        with (epath.Path(folder) / shard.file).open("rb") as remote:
            shutil.copyfileobj(remote, file, 1 << 22)
        file.flush()
        if not is_complete(file.name, shard, checksum=True):
            raise ConfigError(f"{folder}/{shard.file} is damaged: run --mode=prepare on its folder again.")

    storage.write(os.path.join(local, shard.file), put)


class _OpenShard:
    """An open shard, used by one thread at a time. The file closes with the last reference."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: ArrayRecordReader | None = None


class _ShardReaders:
    """Pool of open shards for several threads.

    ArrayRecord reads in two ways. `seek` and `read` takes a third of the time on local disks, but
    holds the GIL while it waits. Reading a list of positions hands them to threads and releases the
    GIL. The pool starts with the first way. It changes to the second one when storage turns out to
    be slow, so that several shards are read at the same time.
    """

    def __init__(self, paths: list[str], repair_hint: str):
        self._paths, self._repair_hint, self._slow = paths, repair_hint, False
        self._open: collections.OrderedDict[int, _OpenShard] = collections.OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # guards `_open`
        # On fast storage only one batch is read at a time: two would compete for the GIL.
        self._batch_lock = threading.Lock()

    def read(self, shards: list[int], positions: list[int]) -> list[bytes]:
        if not shards:
            return []  # the time of an empty batch says nothing about the storage
        if self._slow:
            rows: dict[int, list[int]] = {}
            for i, shard in enumerate(shards):
                rows.setdefault(shard, []).append(i)
            by_row: dict[int, bytes] = {}
            for shard, shard_rows in rows.items():
                by_row |= zip(shard_rows, self._read(shard, [positions[i] for i in shard_rows]))
            return [by_row[i] for i in range(len(shards))]
        with self._batch_lock:
            start = time.perf_counter()
            records = [self._read(shard, [position])[0] for shard, position in zip(shards, positions)]
            self._slow |= time.perf_counter() - start > SLOW_SECONDS_PER_RECORD * len(records)
        return records

    def _read(self, shard: int, positions: list[int]) -> list[bytes]:
        """Reads records of one shard. Unless storage is slow, `positions` has one element."""
        with self._lock:
            entry = self._open[shard] = self._open.get(shard) or _OpenShard()
            self._open.move_to_end(shard)
            while len(self._open) > open_files.reader_limit(MAX_OPEN):
                self._open.popitem(last=False)
        with entry.lock:
            try:
                if entry.reader is None:
                    entry.reader = ArrayRecordReader(
                        self._paths[shard], "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
                    )
                if self._slow:
                    return list(entry.reader.read(positions))
                entry.reader.seek(positions[0])
                return [entry.reader.read()]
            except Exception as error:  # ArrayRecord maps its status codes to many Python types
                raise ConfigError(
                    f"{self._paths[shard]} is damaged at record {', '.join(map(str, positions))} ({first_line(error)}): "
                    f"{self._repair_hint}."
                ) from None


class Records(Source):
    """Source `arrayrecord`: random access to a prepared folder."""

    splits, kinds = (), ("images", "latents")
    reads_buckets = True
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Records":
        source = cls(data.path)
        if (split := source.manifest["split"]) != data.split:
            raise ConfigError(
                f"{data.path} was prepared from split {split!r}, not {data.split!r}: set config.data.split={split}, or "
                f"prepare split {data.split!r} and give its folder as config.data.path."
            )
        return source

    def __init__(self, folder: str):
        """Reads the manifest and checks the shards. Shards in a bucket are copied first.

        The check compares sizes, and for small data sets SHA-256 sums.

        Raises:
          ConfigError: The manifest does not exist, or a shard is missing, has another size or is
            damaged.
        """
        self.manifest = content = read_manifest(folder)
        self.kind, self.classes, self.names = content["kind"], content["classes"], tuple(content["names"])
        self.attributes = tuple((name, tuple(values)) for name, values in content.get("attributes", []))
        shards, shape = _shards(content), tuple(content["shape"])
        self.fingerprint = _fingerprint(content)
        self._repair_hint = "run --mode=prepare on its folder again"
        if storage.is_remote(folder):
            folder, self._repair_hint = _download_shards(folder, content), "remove the file, and it is copied again"
        self._paths = [os.path.join(folder, shard.file) for shard in shards]
        checksum = sum(shard.size for shard in shards) <= _MAX_CHECKSUM_BYTES
        for path, shard in zip(self._paths, shards):
            if not is_complete(path, shard):
                raise ConfigError(f"{path} is missing or not {shard.size} bytes long: {self._repair_hint}.")
            if checksum and not is_complete(path, shard, checksum=True):
                raise ConfigError(f"{path} is damaged: {self._repair_hint}.")
        self._ends = np.cumsum([shard.records for shard in shards])
        self._dtype = dtype(self.kind, shape, len(self.attributes))
        self._readers = _ShardReaders(self._paths, self._repair_hint)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = _ShardReaders(self._paths, self._repair_hint)  # each process opens its own

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._paths[shard]} record {index - (self._ends[shard - 1] if shard else 0)}"

    def read(self, indices: np.ndarray) -> Examples:
        """Returns the records at `indices`; their arrays are strided views of one buffer.

        Raises:
          ConfigError: A shard is damaged. The message names it.
        """
        size = self._dtype.itemsize  # the caption follows
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        encoded = self._readers.read(shards.tolist(), (indices - starts[shards]).tolist())
        rows = np.frombuffer(bytearray().join([record[:size] for record in encoded]), self._dtype)
        # Copying each field to its own array would double the time, mostly in page faults.
        arrays = {name: rows[name] for name in self._dtype.names or ()}
        label, attributes = arrays.pop("label"), arrays.pop("attributes", None)
        return Examples(arrays, label, [record[size:].decode() for record in encoded], attributes)


def _fingerprint(content: Mapping[str, Any]) -> str:
    """Computes the fingerprint of prepared records from their manifest.

    Checksums of shards are left out: a shard that is made again on another machine may differ in
    its last bits.
    """
    hashed = {name: value for name, value in content.items() if name not in ("shards", "skipped")}
    if hashed.get("codec"):  # _VAE_FACTS follow from the weights
        hashed["codec"] = {name: value for name, value in hashed["codec"].items() if name not in _VAE_FACTS}
    return fingerprint([json.dumps(hashed, sort_keys=True), *(str(shard.records) for shard in _shards(content))])
