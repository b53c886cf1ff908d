"""Prepared data: ArrayRecord shards of images or VAE latents, and the manifest that vouches for them.

A record is its label, the attributes where the source has some, and its arrays, as raw bytes in the layout of `dtype`, then
the caption as UTF-8: reading one is `np.frombuffer`. Shards hold one record a chunk (group_size:1), uncompressed: noise-like
float16 does not compress, and reading at random would pay for it (figures in docs/data.md). `--mode=prepare` writes them
(`modes/prepare.py`).

ArrayRecord keeps a hash of every chunk and compares it at reading, so that a changed byte of a record or of the index at
the shard's end is an error, never another image. The JSON files hold a hash of themselves.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import math
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

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import preprocess
from madformer_jax.data.source import Examples, Source, fingerprint
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import open_files, storage

FORMAT = 2  # of the manifest; 1 had no seals, no names of classes, and the VAE's path for its weights
MANIFEST = "manifest.json"
MAX_OPEN = 400  # shards that a process holds open, if the system allows it. Reading goes on with more, slower
SLOW_SECONDS_PER_RECORD = (
    1e-3  # seconds a record, in the mean over a batch: more than any local disk takes; a bucket that is mounted, say
)
_MAX_CHECKSUM_BYTES = (
    1 << 28
)  # bytes: smaller sets are compared with their SHA-256 sums at every start, in well under a second
_VAE_FACTS = ("scaling_factor", "shift_factor", "channels", "downsampling")  # facts of the manifest's codec
_COPY_THREADS = 8  # shards copied from a bucket at once


class Shard(NamedTuple):
    """One finished shard, as its own JSON file and the manifest tell of it."""

    file: str
    records: int  # 0 if every image of it was skipped
    size: int  # bytes
    sha256: str
    shape: list[int]  # of a record's arrays; [] without a record
    skipped: Any  # name and reason of each; in the manifest, their number


def dtype(kind: str, shape: tuple[int, ...], attributes: int = 0) -> np.dtype:
    """Layout of a record: label, attributes, then "image" uint8 or "mean" and "logvar" float16, each of `shape`."""
    about = [("label", "<i4"), *([("attributes", "<i4", (attributes,))] if attributes else [])]
    arrays = [("image", "u1")] if kind == "images" else [("mean", "<f2"), ("logvar", "<f2")]
    return np.dtype([*about, *((name, of, shape) for name, of in arrays)])


# ---- writing


def open_writer(path: str) -> ArrayRecordWriter:
    """A writer of shards; `write` takes the bytes of a record, `close` ends the file."""
    return ArrayRecordWriter(path, "group_size:1,uncompressed")


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """What a writer raises, as the OSError that it is: a full disk shows at any `write`, or not before `close`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(first_line(error)) from None


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(path: storage.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file with a hash of its content in it."""
    storage.write_json(path, {**content, "seal": _seal(content)})


def read_sealed(path: storage.Path) -> dict[str, Any] | None:
    """The content of a JSON file of ours; None where there is none.

    Raises:
      ConfigError: it cannot be read, or is not as it was written.
    """
    content = storage.read_json(path)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it holds no JSON object.")
    seal = content.pop("seal", None)
    if seal != _seal(content) and (seal is not None or content.get("format") != 1):
        raise ConfigError(f"{path} is damaged: it is not as it was written. Prepare the data again.")
    return content


def is_complete(path: storage.Path, shard: Shard, checksum: bool = False) -> bool:
    """Whether the file of a shard is there with its size and, if asked for, its checksum."""
    there = epath.Path(path)
    if not there.exists() or there.stat().length != shard.size:
        return False
    return not checksum or storage.sha256(path) == shard.sha256


# ---- reading


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      ConfigError: there is none (not prepared, or not finished), or it is damaged or not ours.
    """
    path = epath.Path(folder) / MANIFEST
    content = read_sealed(path)
    if content is None:
        raise ConfigError(
            f"{folder!r} holds no {MANIFEST}: make the records with --mode=prepare, or run it again if it was stopped."
        )
    if content.get("format") not in (1, FORMAT):
        raise ConfigError(f"{path} is of format {content.get('format')}, not {FORMAT}: prepare the data again.")
    if content["format"] == 1:
        content["names"] = [str(label) for label in range(content["classes"])]
    return content


def _shards(content: Mapping[str, Any]) -> list[Shard]:
    return [shard for shard in (Shard(**entry) for entry in content["shards"]) if shard.records]


def _download_shards(folder: str, content: Mapping[str, Any]) -> str:
    """Copies the shards of a bucket that are not there yet to the user's cache, and returns their local folder."""
    local = os.path.join(storage.user_cache("records"), _seal(content)[:32])
    with storage.wrap_errors(f"{folder} cannot be copied to {local}"):
        os.makedirs(local, exist_ok=True)
        with open(os.path.join(local, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this machine may be copying
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
        with (epath.Path(folder) / shard.file).open("rb") as there:
            shutil.copyfileobj(there, file, 1 << 22)
        file.flush()
        if not is_complete(file.name, shard, checksum=True):
            raise ConfigError(f"{folder}/{shard.file} is damaged: run --mode=prepare on its folder again.")

    storage.write(os.path.join(local, shard.file), put)


class _OpenShard:
    """An open shard, for one thread at a time; its file is closed when nobody refers to it any more."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: ArrayRecordReader | None = None


class _ShardReaders:
    """Open shards, for several threads.

    A reader that seeks and then reads takes a third of the time of one that is given the positions: that one hands them
    to threads of its own. But it holds Python's lock while it waits, with which nothing else of the process runs: where
    storage answers late, positions of the same shard are given together, and other shards are read at the same time.
    """

    def __init__(self, paths: list[str], mend: str):
        self._paths, self._mend, self._late = paths, mend, False
        self._lock = threading.Lock()  # of `_open`
        # of a whole batch, where storage is not late: two would wait for Python's lock by turns
        self._batch = threading.Lock()
        self._open: collections.OrderedDict[int, _OpenShard] = collections.OrderedDict()

    def read(self, shards: list[int], positions: list[int]) -> list[bytes]:
        if not shards:
            return []  # else the time for nothing would count as late
        if self._late:
            rows: dict[int, list[int]] = {}
            for i, shard in enumerate(shards):
                rows.setdefault(shard, []).append(i)
            found: dict[int, bytes] = {}
            for shard, mine in rows.items():
                found |= zip(mine, self._read(shard, [positions[i] for i in mine]))
            return [found[i] for i in range(len(shards))]
        with self._batch:
            began = time.perf_counter()
            records = [self._read(shard, [position])[0] for shard, position in zip(shards, positions)]
            self._late |= time.perf_counter() - began > SLOW_SECONDS_PER_RECORD * len(records)
        return records

    def _read(self, shard: int, positions: list[int]) -> list[bytes]:
        """Records of a shard; of one position where storage is not late."""
        with self._lock:
            there = self._open[shard] = self._open.get(shard) or _OpenShard()
            self._open.move_to_end(shard)
            while len(self._open) > open_files.reader_limit(MAX_OPEN):
                self._open.popitem(last=False)
        with there.lock:
            try:
                if there.reader is None:
                    there.reader = ArrayRecordReader(
                        self._paths[shard], "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
                    )
                if self._late:
                    return list(there.reader.read(positions))
                there.reader.seek(positions[0])
                return [there.reader.read()]
            except Exception as error:  # ArrayRecord raises its status as whatever Python type fits
                raise ConfigError(
                    f"{self._paths[shard]} is damaged at record {', '.join(map(str, positions))} ({first_line(error)}): "
                    f"{self._mend}."
                ) from None


class Records(Source):
    """Random access to a prepared folder (source `arrayrecord`), a batch at a time."""

    manifest: Mapping[str, Any]

    def __init__(self, folder: str):
        """Reads the manifest and checks that the shards are there with their sizes; those of a bucket are copied first.

        Raises:
          ConfigError: no manifest, or a shard is missing, of another size or, as far as it is read here, damaged.
        """
        self.manifest = content = read_manifest(folder)
        try:
            self.kind, self.classes, self.names = content["kind"], content["classes"], tuple(content["names"])
            self.attributes = tuple((name, tuple(values)) for name, values in content.get("attributes", []))
            shards, shape = _shards(content), tuple(content["shape"])
            self.fingerprint = _fingerprint(content)
        except (KeyError, TypeError) as error:  # of format 1, which is not sealed
            raise ConfigError(f"{folder}/{MANIFEST} is damaged ({error!r}): prepare the data again.") from None
        self._mend = (
            "run --mode=prepare on its folder again" if content["format"] == FORMAT else "prepare the data again"
        )
        if storage.is_remote(folder):
            folder, self._mend = _download_shards(folder, content), "remove the file, and it is copied again"
        self._paths = [os.path.join(folder, shard.file) for shard in shards]
        summed = sum(shard.size for shard in shards) <= _MAX_CHECKSUM_BYTES
        for path, shard in zip(self._paths, shards):
            if not is_complete(path, shard):
                raise ConfigError(f"{path} is missing or not {shard.size} bytes long: {self._mend}.")
            if summed and not is_complete(path, shard, checksum=True):
                raise ConfigError(f"{path} is damaged: {self._mend}.")
        self._ends = np.cumsum([shard.records for shard in shards])
        self._dtype = dtype(self.kind, shape, len(self.attributes))
        self._readers = _ShardReaders(self._paths, self._mend)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = _ShardReaders(self._paths, self._mend)  # each process opens its own

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
        label, attributes = arrays.pop("label"), arrays.pop("attributes", None)
        return Examples(arrays, label, [record[size:].decode() for record in found], attributes)

    def _bytes(self, indices: np.ndarray) -> list[bytes]:
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return self._readers.read(shards.tolist(), (indices - starts[shards]).tolist())


def _fingerprint(content: Mapping[str, Any]) -> str:
    """Of what decides which records there are; a shard that was made anew may differ in its last bits."""
    kept = {name: value for name, value in content.items() if name not in ("shards", "skipped")}
    if kept.get("codec"):  # its other facts follow from the weights, and earlier versions did not write them
        kept["codec"] = {name: value for name, value in kept["codec"].items() if name not in _VAE_FACTS}
    return fingerprint([json.dumps(kept, sort_keys=True), *(str(shard.records) for shard in _shards(content))])


def check_manifest(made: Mapping[str, Any], config: ConfigDict, table: preprocess.Preprocessor) -> None:
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
    sizes, shape = derive_sizes(config), tuple(made["shape"])
    if shape and shape != (sizes.latent, sizes.latent, sizes.channels):
        raise ConfigError(
            f"config.data.path={config.data.path!r} holds latents of {' x '.join(map(str, shape))} values, and the model takes "
            f"{sizes.latent} x {sizes.latent} x {sizes.channels}: prepare them with Stable Diffusion's VAE or one like it."
        )
    factor = made["codec"].get("scaling_factor")
    if factor is None:
        logging.warning(
            "%s does not say by what the VAE's latents are multiplied: config.codec.scaling_factor=%s is taken.",
            config.data.path, config.codec.scaling_factor,
        )  # fmt: skip
    elif not math.isclose(factor, config.codec.scaling_factor):
        raise ConfigError(
            f"config.codec.scaling_factor={config.codec.scaling_factor}, but the latents of config.data.path="
            f"{config.data.path!r} are of a VAE with {factor}: set config.codec.scaling_factor={factor}."
        )
    path = made["codec"].get("path", config.codec.path)  # of format 1
    if path != config.codec.path:
        logging.warning(
            "the latents were made with codec.path=%r and the config has %r: they must be the same VAE.",
            path, config.codec.path,
        )  # fmt: skip
