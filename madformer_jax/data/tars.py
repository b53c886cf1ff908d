"""Source `webdataset`: images in tar shards, read at random where they lie, nothing unpacked.

The members of a sample share the path up to the first dot of the name: `0001.webp`, `0001.cls` (a class number),
`0001.json` (its field "label"), `0001.txt` (a caption). The tars are walked once; the index is kept in the user's cache
folder and made again when a tar's size or time changes.

The index is one file: the number of rows, the rows (`_ROW`), their names and captions one after the other, and the SHA-256
of all that. It is mapped into memory, so that workers share it.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging

from madformer_jax.data.source import EXTENSIONS, Examples, Source, files_below, fingerprint, held_out, place
from madformer_jax.data.text import clean
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_INDEX = 2  # format of the cached index
_ROW = np.dtype([
    ("tar", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"),  # of the image's bytes
    ("name", "<i8"), ("caption", "<i8"),  # where they begin in the text; each ends where the next one begins
    ("place", "<u8"),  # source.place of the name
])  # fmt: skip
_SIDECARS = (".cls", ".json", ".txt")
_CLASSES = 1_000_000  # more are no classes
_COUNT = np.dtype("<i8")
_DIGEST = hashlib.sha256().digest_size


class _Index(NamedTuple):
    rows: np.ndarray  # _ROW (n + 1,): a row for each image, the last one only ends the text; label -1: none
    text: np.ndarray  # uint8


class Tars(Source):
    """Random access to the images of a folder of tars, or of one."""

    def __init__(self, path: str):
        """Finds the tars below `path`, and indexes them unless that was done before.

        Raises:
          ConfigError: no tar or no image there, a tar is damaged or repeats a sample, or only some of the images have labels.
        """
        with storage.errors(f"config.data.path={path!r} cannot be read"):
            self._tars = _tars(path)
            root = path if os.path.isdir(path) else os.path.dirname(path)
            short = [tar.removeprefix(root).lstrip(os.sep) for tar in self._tars]  # the same wherever the tars lie
            self._cache = _cache_file(self._tars, short)
            self._index, digest = _cached(path, self._tars, short, self._cache)
        if not len(self):
            raise ConfigError(f"config.data.path={path!r} holds no image in its {len(self._tars)} tar files.")
        labels = self._index.rows["label"][:-1]
        unlabelled = np.flatnonzero(labels < 0)
        if 0 < len(unlabelled) < len(labels):
            raise ConfigError(
                f'{self.name(int(unlabelled[0]))} has no label (.cls, or .json with "label"), and others have: '
                f"{len(unlabelled)} of {len(labels)} lack one."
            )
        self.classes = int(labels.max()) + 1
        self.names = tuple(str(label) for label in range(self.classes))
        self.fingerprint = fingerprint([*short, digest])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None} if os.path.exists(self._cache) else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._index is None:
            self._index = _map(self._cache)

    def __len__(self) -> int:
        return len(self._index.rows) - 1

    def read(self, indices: np.ndarray) -> Examples:
        rows = self._index.rows[indices]
        images = [self._image(row) for row in rows]
        return Examples({"image": images}, np.maximum(rows["label"], 0), self.captions(indices))

    def captions(self, indices: np.ndarray) -> list[str]:
        rows = self._index.rows[indices]
        return [self._text(row["caption"], end) for row, end in zip(rows, self._index.rows["name"][indices + 1])]

    def _image(self, row: np.void) -> bytes:
        with open(self._tars[row["tar"]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(row["size"]), int(row["offset"]))

    def _text(self, start: int, end: int) -> str:
        return self._index.text[start:end].tobytes().decode("utf-8", "surrogateescape")

    def held_out(self, share: float) -> np.ndarray:
        return held_out(self._index.rows["place"][:-1], share)

    def name(self, index: int) -> str:
        row = self._index.rows[index]
        return f"{self._tars[row['tar']]}:{self._text(row['name'], row['caption'])}"


def _tars(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    found = [file for file in files_below(path) if file.endswith(".tar")] if os.path.isdir(path) else []
    if not found:
        raise ConfigError(f"config.data.path={path!r} holds no .tar file (compressed tars cannot be read at random).")
    return found


def _cache_file(tars: list[str], short: list[str]) -> str:
    """Where the index is kept: of these tars as they are, and as they are called, which decides what is held out."""
    key = hashlib.sha256(str(_INDEX).encode())
    for tar, name in zip(tars, short):
        stat = os.stat(tar)
        key.update(
            f"{os.path.abspath(tar)} {name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
    return os.path.join(storage.user_cache("tars"), f"{key.hexdigest()}.index")


def _cached(path: str, tars: list[str], short: list[str], cache: str) -> tuple[_Index, str]:
    """The index of the tars and its checksum: from the cache if it is there and whole, else made anew and kept there."""
    if os.path.exists(cache) and os.path.getsize(cache) > _DIGEST:
        kept = np.memmap(cache, np.uint8, "r")
        digest = hashlib.sha256(kept[:-_DIGEST])
        if digest.digest() == kept[-_DIGEST:].tobytes():
            return _map(cache), digest.hexdigest()
        logging.warning("the index %s is damaged, and is made again", cache)
    logging.info("indexing %d tar shards of %s", len(tars), path)
    index = _make(tars, short)
    content = np.array(len(index.rows), _COUNT).tobytes() + index.rows.tobytes() + index.text.tobytes()
    digest = hashlib.sha256(content)

    def put(file: IO[bytes]) -> None:
        file.write(content)
        file.write(digest.digest())

    try:
        storage.write(cache, put)
    except OSError as error:
        logging.warning("the index of the tars is not kept, and will be made again next time: %s", error)
        return index, digest.hexdigest()
    return _map(cache), digest.hexdigest()


def _map(cache: str) -> _Index:
    count = int(np.fromfile(cache, _COUNT, 1)[0])
    start = _COUNT.itemsize + count * _ROW.itemsize
    text = os.path.getsize(cache) - _DIGEST - start
    return _Index(
        np.memmap(cache, _ROW, "r", _COUNT.itemsize, (count,)),
        np.memmap(cache, np.uint8, "r", start, (text,)) if text else np.zeros(0, np.uint8),
    )


def _make(tars: list[str], short: list[str]) -> _Index:
    parts, text = [], bytearray()
    for i, tar in enumerate(tars):
        rows = []
        for name, offset, size, label, caption in _samples(tar):
            start = len(text)
            text += name
            where = place(f"{short[i]}:{name.decode('utf-8', 'surrogateescape')}")
            rows.append((i, label, offset, size, start, len(text), where))
            text += caption
        parts.append(np.array(rows, _ROW))
    parts.append(np.array([(0, -1, 0, 0, len(text), len(text), 0)], _ROW))
    return _Index(np.concatenate(parts), np.frombuffer(bytes(text), np.uint8))


def _samples(path: str) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    """Image member, its offset and size, label (-1: none) and caption of each sample of a tar, in its order."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    captions: dict[str, bytes] = {}
    seen: set[tuple[str, str]] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if member.isdir() or name.startswith(".") or extension not in EXTENSIONS + _SIDECARS:
                    continue
                if not member.isreg() or member.issparse():
                    raise ConfigError(f"{path}:{member.name} is a link or no plain file: pack the files themselves.")
                kind = "image" if extension in EXTENSIONS else extension
                if (key, kind) in seen:
                    raise ConfigError(
                        f"{path}:{member.name}: the tar has another {kind} of this sample: names must differ."
                    )
                seen.add((key, kind))
                if extension in EXTENSIONS:
                    images[key] = member
                else:
                    file = tar.extractfile(member)
                    content = file.read() if file else b""
                    if extension == ".txt":
                        captions[key] = _caption(content, f"{path}:{member.name}")
                    elif (label := _label(content, extension, f"{path}:{member.name}")) is not None:
                        labels[key] = label
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{path} is no plain tar file or is damaged: {error}.") from None
    if os.path.getsize(path) < end or any(m.offset_data + m.size > os.path.getsize(path) for m in images.values()):
        raise ConfigError(f"{path} is cut off: download it again.")
    for key, member in images.items():
        yield (
            member.name.encode("utf-8", "surrogateescape"),
            member.offset_data,
            member.size,
            labels.get(key, -1),
            captions.get(key, b""),
        )


def _caption(content: bytes, name: str) -> bytes:
    return clean(storage.decode_text(content, name), name).strip().encode()


def _label(content: bytes, extension: str, name: str) -> int | None:
    """The class in a sidecar file; None for a .json without one."""
    try:
        value = content if extension == ".cls" else json.loads(content).get("label")
        label = None if value is None else int(str(value, "ascii") if isinstance(value, bytes) else str(value))
    except (ValueError, AttributeError):
        raise ConfigError(f"{name} holds no class number.") from None
    if label is not None and not 0 <= label < _CLASSES:
        raise ConfigError(f"{name}: class {label} is out of range: classes count from 0 and are below {_CLASSES}.")
    return label
