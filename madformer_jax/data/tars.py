"""Source `webdataset`: random access to images in tar shards, without unpacking them.

The members of a sample share their name up to the suffix:
`0001.webp`, `0001.cls` (a class number), `0001.json` (with a field "label"), `0001.txt` (a
caption). `members` reads one tar, and `labels` turns its labels into classes. The tars are read
once to build an index in the user's cache folder. The index is rebuilt when the size or time of a
tar changes.

The index is one file with these parts, mapped into memory so that workers share it:
  1. the number of rows,
  2. the rows (`_ROW_DTYPE`),
  3. names and captions, one after the other,
  4. a report as JSON (names of classes, what was left out), or nothing,
  5. the SHA-256 of parts 1 to 4.
"""

import hashlib
import json
import os
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.data import labels, listing, members
from madformer_jax.data.source import Examples, Source, fingerprint, hash_fraction, test_mask
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_INDEX_FORMAT = 3  # format of the cached index
_ROW_DTYPE = np.dtype([
    ("tar", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"),  # offset and size of the image's bytes
    ("name", "<i8"), ("caption", "<i8"),  # start positions in the text; each ends where the next one starts
    ("hash", "<u8"),  # `source.hash_fraction` of tar and name
])  # fmt: skip
_COUNT_DTYPE = np.dtype("<i8")
_DIGEST_BYTES = hashlib.sha256().digest_size


class _Index(NamedTuple):
    """The index of a set of tars, in memory."""

    rows: np.ndarray  # _ROW_DTYPE (n + 1,): a row for each image, and one that only ends the text
    text: np.ndarray  # uint8; the report starts at the caption of the last row

    def report(self) -> dict[str, Any]:
        """Returns the report that `_build_index` wrote; {} if it had nothing to report."""
        content = self.text[self.rows["caption"][-1] :].tobytes()
        return json.loads(content) if content else {}


class Tars(Source):
    """The images of a folder of tars, or of a single tar."""

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Tars":
        return cls(data.path, data.max_corrupt)

    def __init__(self, path: str, max_unlabeled: float = 0.05):
        """Finds the tars below `path`, loads or builds their index, and logs what is left out.

        Args:
          path: A folder of tars, or a tar.
          max_unlabeled: Largest share of images that may be left out because their label is missing
            or unusable.

        Raises:
          ConfigError: There is no tar or no image, a tar is damaged or repeats a sample, or more
            than `max_unlabeled` of the images have no usable label.
        """
        exclusions = listing.Exclusions()
        with storage.wrap_errors(f"config.data.path={path!r} cannot be read"):
            self._tars = _find_tars(path, exclusions)
            root = path if os.path.isdir(path) else os.path.dirname(path)
            # Names are relative: moving the folder changes neither the fingerprint nor the split.
            names = [tar.removeprefix(root).lstrip(os.sep) for tar in self._tars]
            self._cache = _index_path(self._tars, names)
            self._index, digest = _load_or_build_index(path, self._tars, names, self._cache)
        report = self._index.report()
        excluded_members = report.get("left_out", "")
        if not len(self._index.rows) - 1:
            raise ConfigError(
                f"config.data.path={path!r} holds no image in its {len(self._tars)} tar files"
                f"{f'; left out: {excluded_members}' if excluded_members else ''}."
            )
        exclusions.log(path)
        if excluded_members:
            listing.warn_once(f"{listing.printable(path)}: left out of the tars: {excluded_members}")
        classes = self._index.rows["label"][:-1]
        self._selection: np.ndarray | None = None  # numbers of the rows that are used; None: all
        reason = report.get("odd", "")
        self._selection = labels.labeled_rows(
            classes,
            max_unlabeled,
            lambda row: reason or f'{self.name(row)} has no label (.cls, or .json with "label"), and others have',
        )
        self.names = tuple(report.get("names") or map(str, range(int(classes.max()) + 1)))
        self.fingerprint = fingerprint([*names, digest])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None} if os.path.exists(self._cache) else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._index is None:
            self._index = _map_index(self._cache)

    def __len__(self) -> int:
        return len(self._index.rows) - 1 if self._selection is None else len(self._selection)

    def _row_numbers(self, indices: np.ndarray) -> np.ndarray:
        return indices if self._selection is None else self._selection[indices]

    def read(self, indices: np.ndarray) -> Examples:
        rows = self._index.rows[self._row_numbers(indices)]
        images = [self._read_image(row) for row in rows]
        return Examples({"image": images}, self.labels(indices), self.captions(indices))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return np.maximum(self._index.rows["label"][self._row_numbers(indices)], 0)

    def captions(self, indices: np.ndarray) -> list[str]:
        numbers = self._row_numbers(indices)
        starts, ends = self._index.rows["caption"][numbers], self._index.rows["name"][numbers + 1]
        return [self._text(start, end) for start, end in zip(starts, ends)]

    def _read_image(self, row: np.void) -> bytes:
        with open(self._tars[row["tar"]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(row["size"]), int(row["offset"]))

    def _text(self, start: int, end: int) -> str:
        return self._index.text[start:end].tobytes().decode("utf-8", "surrogateescape")

    def split_indices(self, test_share: float) -> np.ndarray:
        hashes = self._index.rows["hash"][self._row_numbers(np.arange(len(self)))]
        return test_mask(hashes, test_share).astype(int)

    def name(self, index: int) -> str:
        row = self._index.rows[self._row_numbers(np.array(index))]
        return listing.printable(f"{self._tars[row['tar']]}:{self._text(row['name'], row['caption'])}")


def _find_tars(path: str, exclusions: listing.Exclusions) -> list[str]:
    if os.path.isfile(path):
        return [path]
    files = listing.list_files(path, exclusions) if os.path.isdir(path) else []
    tars = listing.filter_by_suffix(files, (".tar",), (), exclusions)
    if not tars:
        others = exclusions.summary()
        raise ConfigError(
            f"config.data.path={path!r} holds no .tar file (compressed tars cannot be read at random)"
            f"{f'; left out: {others}' if others else ''}."
        )
    return tars


def _index_path(tars: list[str], names: list[str]) -> str:
    """Returns the path of the cached index.

    It depends on the sizes and times of the tars, and on their relative names, because the names
    decide which samples are held out.
    """
    key = hashlib.sha256(str(_INDEX_FORMAT).encode())
    for tar, name in zip(tars, names):
        stat = os.stat(tar)
        key.update(
            f"{os.path.abspath(tar)} {name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
    return os.path.join(storage.user_cache("tars"), f"{key.hexdigest()}.index")


def _load_or_build_index(path: str, tars: list[str], names: list[str], cache: str) -> tuple[_Index, str]:
    """Opens the index that is cached at `cache`, or builds and caches it if it is missing or damaged.

    Returns:
      The index, and the checksum of its rows, names and captions.
    """
    if os.path.exists(cache) and os.path.getsize(cache) > _DIGEST_BYTES:
        cached = np.memmap(cache, np.uint8, "r")
        if hashlib.sha256(cached[:-_DIGEST_BYTES]).digest() == cached[-_DIGEST_BYTES:].tobytes():
            index = _map_index(cache)
            return index, _checksum(index)
        logging.warning("the index %s is damaged and is rebuilt", cache)
    logging.info("indexing %d tar shards of %s", len(tars), path)
    index = _build_index(tars, names)
    content = np.array(len(index.rows), _COUNT_DTYPE).tobytes() + index.rows.tobytes() + index.text.tobytes()
    try:
        storage.write(cache, lambda file: file.writelines((content, hashlib.sha256(content).digest())))
    except OSError as error:
        logging.warning("the index of the tars cannot be cached and will be rebuilt next time: %s", error)
        return index, _checksum(index)
    return _map_index(cache), _checksum(index)


def _checksum(index: _Index) -> str:
    """Computes the checksum of the index without its report."""
    digest = hashlib.sha256(np.array(len(index.rows), _COUNT_DTYPE).tobytes())
    digest.update(np.ascontiguousarray(index.rows))
    digest.update(index.text[: index.rows["caption"][-1]])
    return digest.hexdigest()


def _map_index(cache: str) -> _Index:
    count = int(np.fromfile(cache, _COUNT_DTYPE, 1)[0])
    start = _COUNT_DTYPE.itemsize + count * _ROW_DTYPE.itemsize
    text = os.path.getsize(cache) - _DIGEST_BYTES - start
    return _Index(
        np.memmap(cache, _ROW_DTYPE, "r", _COUNT_DTYPE.itemsize, (count,)),
        np.memmap(cache, np.uint8, "r", start, (text,)) if text else np.zeros(0, np.uint8),
    )


def _build_index(tars: list[str], names: list[str]) -> _Index:
    exclusions, classes = listing.Exclusions(), labels.ClassIndex()
    blocks, text = [], bytearray()
    for i, tar in enumerate(tars):
        rows = []
        for sample in members.samples(tar, exclusions):
            start = len(text)
            text += sample.name.encode("utf-8", "surrogateescape")
            name_hash = hash_fraction(f"{names[i]}:{sample.name}")
            rows.append((i, classes.add(sample.label), sample.offset, sample.size, start, len(text), name_hash))
            text += sample.caption.encode("utf-8")
        blocks.append(np.array(rows, _ROW_DTYPE))
    blocks.append(np.array([(0, labels.MISSING, 0, 0, len(text), len(text), 0)], _ROW_DTYPE))
    table = np.concatenate(blocks)
    table["label"], class_names, reason = classes.assign_classes(table["label"])
    report = {"names": class_names, "odd": reason, "left_out": exclusions.summary()}
    if any(report.values()):
        text += json.dumps(report).encode()
    return _Index(table, np.frombuffer(bytes(text), np.uint8))
