"""Source `webdataset`: images in tar shards, read at random where they lie, nothing unpacked.

The members of a sample share the path up to the first dot of the name: `0001.webp`, `0001.cls` (a class number),
`0001.json` (its field "label"), `0001.txt` (a caption). The tars are walked once; the index is kept in the user's cache
folder and made again when a tar's size or time changes.
"""

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np
from absl import logging

from madformer_jax.data.source import EXTENSIONS, Examples, Source, fingerprint, held_out
from madformer_jax.errors import ConfigError
from madformer_jax.runtime.storage import user_cache

_INDEX = 1  # format of the cached index


class Tars(Source):
    """Random access to the images of a folder of tars, or of one."""

    def __init__(self, path: str):
        """Finds the tars below `path`, and indexes them unless that was done before.

        Raises:
          ConfigError: no tar or no image there, a tar is damaged, or only some of the images have labels.
        """
        self._tars = _tars(path)
        cache = _cache_file(self._tars)
        try:
            with np.load(cache) as index:
                fields = dict(index)
        except (OSError, ValueError, zipfile.BadZipFile):  # none yet, or half of one
            logging.info("indexing %d tar shards of %s", len(self._tars), path)
            fields = _index(self._tars)
            _save(cache, fields)
        self._tar, self._offset, self._size = fields["tar"], fields["offset"], fields["size"]
        self._names, self._captions, self._labels = fields["name"], fields["caption"], fields["label"]
        if not len(self._tar):
            raise ConfigError(f"config.data.path={path!r} holds no image in its {len(self._tars)} tar files.")
        unlabelled = np.flatnonzero(self._labels < 0)
        if 0 < len(unlabelled) < len(self._labels):
            raise ConfigError(
                f'{self.name(int(unlabelled[0]))} has no label (.cls, or .json with "label"), and others have: '
                f"{len(unlabelled)} of {len(self._labels)} lack one."
            )
        self.classes = int(self._labels.max()) + 1
        self.names = tuple(str(label) for label in range(self.classes))
        self._labels = np.maximum(self._labels, 0)
        self._root = path if os.path.isdir(path) else os.path.dirname(path)
        self.fingerprint = fingerprint([*self._keys(), *map(str, self._labels.tolist())])

    def __len__(self) -> int:
        return len(self._tar)

    def read(self, indices: np.ndarray) -> Examples:
        images = [self._member(index) for index in indices.tolist()]
        return Examples(
            {"image": images}, self._labels[indices], [c.decode() for c in self._captions[indices].tolist()]
        )

    def _member(self, index: int) -> bytes:
        with open(self._tars[self._tar[index]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self._size[index]), int(self._offset[index]))

    def _keys(self) -> list[str]:
        """The names of the records, the same wherever the tars lie."""
        return [self.name(i).removeprefix(self._root).lstrip(os.sep) for i in range(len(self))]

    def held_out(self, share: float) -> np.ndarray:
        return held_out(self._keys(), share)

    def name(self, index: int) -> str:
        return f"{self._tars[self._tar[index]]}:{self._names[index].decode()}"


def _tars(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    found = sorted(
        os.path.join(top, name) for top, _, names in os.walk(path) for name in names if name.endswith(".tar")
    )
    if not found:
        raise ConfigError(f"config.data.path={path!r} holds no .tar file (compressed tars cannot be read at random).")
    return found


def _cache_file(tars: list[str]) -> str:
    key = hashlib.sha256(str(_INDEX).encode())
    for tar in tars:
        stat = os.stat(tar)
        key.update(f"{os.path.abspath(tar)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return os.path.join(user_cache("tars"), f"{key.hexdigest()}.npz")


def _save(cache: str, fields: dict[str, np.ndarray]) -> None:
    part = f"{cache}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        with open(part, "wb") as file:
            np.savez(file, **fields)  # type: ignore[arg-type]
        os.replace(part, cache)
    except OSError as error:
        logging.warning("the index of the tars is not kept, and will be made again next time: %s", error)


def _index(tars: list[str]) -> dict[str, np.ndarray]:
    rows = [(i, *row) for i, tar in enumerate(tars) for row in _samples(tar)]
    tar, name, offset, size, label, caption = zip(*rows) if rows else ((),) * 6
    return {
        "tar": np.array(tar, np.int32),
        "name": np.array(name, np.bytes_),
        "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64),
        "label": np.array(label, np.int32),
        "caption": np.array(caption, np.bytes_),
    }


def _samples(path: str) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    """Image member, its offset and size, label (-1: none) and caption of each sample of a tar, in its order."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    captions: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or name.startswith("."):
                    continue
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if extension in EXTENSIONS:
                    images[key] = member
                elif extension in (".cls", ".json", ".txt"):
                    file = tar.extractfile(member)
                    content = file.read() if file else b""
                    if extension == ".txt":
                        captions[key] = content.strip()
                    elif (label := _label(content, extension, f"{path}:{member.name}")) is not None:
                        labels[key] = label
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{path} is no plain tar file or is damaged: {error}.") from None
    if os.path.getsize(path) < end or any(m.offset_data + m.size > os.path.getsize(path) for m in images.values()):
        raise ConfigError(f"{path} is cut off: download it again.")
    for key, member in images.items():
        yield member.name.encode(), member.offset_data, member.size, labels.get(key, -1), captions.get(key, b"")


def _label(content: bytes, extension: str, name: str) -> int | None:
    """The class in a sidecar file; None for a .json without one."""
    try:
        value = content if extension == ".cls" else json.loads(content).get("label")
        label = None if value is None else int(value)
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{name} holds no class number.") from None
    if label is not None and label < 0:
        raise ConfigError(f"{name}: class {label} is negative; classes count from 0.")
    return label
