"""Source `webdataset`: images in tar shards, read at random where they lie, nothing unpacked.

The members of a sample share the name up to its suffix: `0001.webp`, `0001.cls` (a class number), `0001.json` (its field
"label"), `0001.txt` (a caption). `members` reads one tar, `labels` makes classes of its labels. The tars are walked once;
the index is kept in the user's cache folder and made again when a tar's size or time changes.

The index is one file: the number of rows, the rows (`_ROW`), their names and captions one after the other, a report (names
of classes, what was left out; JSON, or nothing), and the SHA-256 of all that. It is mapped into memory, so that workers
share it.
"""

import hashlib
import json
import os
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging

from madformer_jax.data import labels, listing, members
from madformer_jax.data.source import Examples, Source, fingerprint, hash_fraction, test_mask
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_INDEX_FORMAT = 3  # format of the cached index
_ROW_DTYPE = np.dtype([
    ("tar", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"),  # of the image's bytes
    ("name", "<i8"), ("caption", "<i8"),  # where they begin in the text; each ends where the next one begins
    ("place", "<u8"),  # source.place of the name
])  # fmt: skip
_COUNT_DTYPE = np.dtype("<i8")
_DIGEST_BYTES = hashlib.sha256().digest_size


class _Index(NamedTuple):
    rows: np.ndarray  # _ROW (n + 1,): a row for each image, the last one only ends the text; label: see `labels`
    text: np.ndarray  # uint8; behind the last row's caption begins the report

    def report(self) -> dict[str, Any]:
        """See `_make`."""
        content = self.text[self.rows["caption"][-1] :].tobytes()
        return json.loads(content) if content else {}


class Tars(Source):
    """Random access to the images of a folder of tars, or of one."""

    def __init__(self, path: str, most: float = 0.05):
        """Finds the tars below `path`, and indexes them unless that was done before. Log lines say what is left out.

        Args:
          path: A folder of tars, or a tar.
          most: Share of the images that are left out because their label is missing or unusable; more is an error.

        Raises:
          ConfigError: no tar or no image there, a tar is damaged or repeats a sample, or too many images lack a label.
        """
        left_out = listing.Exclusions()
        with storage.wrap_errors(f"config.data.path={path!r} cannot be read"):
            self._tars = _find_tars(path, left_out)
            root = path if os.path.isdir(path) else os.path.dirname(path)
            short = [tar.removeprefix(root).lstrip(os.sep) for tar in self._tars]  # the same wherever the tars lie
            self._cache = _index_path(self._tars, short)
            self._index, digest = _load_or_build_index(path, self._tars, short, self._cache)
        report = self._index.report()
        inside = report.get("left_out", "")
        if not len(self._index.rows) - 1:
            raise ConfigError(
                f"config.data.path={path!r} holds no image in its {len(self._tars)} tar files"
                f"{f'; left out: {inside}' if inside else ''}."
            )
        left_out.log(path)
        if inside:
            listing.warn_once(f"{listing.printable(path)}: left out of the tars: {inside}")
        found = self._index.rows["label"][:-1]
        self._chosen: np.ndarray | None = None  # numbers of the rows that count; None: all
        self._choose(found, most, report.get("odd", ""))
        self.classes = max(int(found.max()) + 1, 0)
        self.names = tuple(report.get("names") or map(str, range(self.classes)))
        self.fingerprint = fingerprint([*short, digest])

    def _choose(self, found: np.ndarray, most: float, odd: str) -> None:
        """Leaves out the images without a usable label, if others have one."""
        lacking = np.flatnonzero(found < 0)
        odd_count = int((found == labels.UNUSABLE).sum())
        labelled = len(lacking) < len(found)
        if not (odd_count or 0 < len(lacking) < len(found)):
            return
        first = odd or f'{self.name(int(lacking[0]))} has no label (.cls, or .json with "label"), and others have'
        count = len(lacking) if labelled else odd_count
        what = f"{first}: {count} of {len(found)} lack one"
        if count > most * len(found):
            raise ConfigError(f"{what}, more than config.data.max_corrupt={most}. Mend the labels, or remove them all.")
        if labelled:
            self._chosen = np.flatnonzero(found >= 0)
        listing.warn_once(f"{what}; {'they are left out' if labelled else 'the labels are ignored'}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None} if os.path.exists(self._cache) else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._index is None:
            self._index = _map_index(self._cache)

    def __len__(self) -> int:
        return len(self._index.rows) - 1 if self._chosen is None else len(self._chosen)

    def _numbers(self, indices: np.ndarray) -> np.ndarray:
        return indices if self._chosen is None else self._chosen[indices]

    def read(self, indices: np.ndarray) -> Examples:
        rows = self._index.rows[self._numbers(indices)]
        images = [self._image(row) for row in rows]
        return Examples({"image": images}, np.maximum(rows["label"], 0), self.captions(indices))

    def captions(self, indices: np.ndarray) -> list[str]:
        numbers = self._numbers(indices)
        starts, ends = self._index.rows["caption"][numbers], self._index.rows["name"][numbers + 1]
        return [self._text(start, end) for start, end in zip(starts, ends)]

    def _image(self, row: np.void) -> bytes:
        with open(self._tars[row["tar"]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(row["size"]), int(row["offset"]))

    def _text(self, start: int, end: int) -> str:
        return self._index.text[start:end].tobytes().decode("utf-8", "surrogateescape")

    def held_out(self, share: float) -> np.ndarray:
        return test_mask(self._index.rows["place"][self._numbers(np.arange(len(self)))], share)

    def name(self, index: int) -> str:
        row = self._index.rows[self._numbers(np.array(index))]
        return listing.printable(f"{self._tars[row['tar']]}:{self._text(row['name'], row['caption'])}")


def _find_tars(path: str, left_out: listing.Exclusions) -> list[str]:
    if os.path.isfile(path):
        return [path]
    files = listing.list_files(path, left_out) if os.path.isdir(path) else []
    found = listing.filter_by_suffix(files, (".tar",), (), left_out)
    if not found:
        others = left_out.line()
        raise ConfigError(
            f"config.data.path={path!r} holds no .tar file (compressed tars cannot be read at random)"
            f"{f'; left out: {others}' if others else ''}."
        )
    return found


def _index_path(tars: list[str], short: list[str]) -> str:
    """Where the index is kept: of these tars as they are, and as they are called, which decides what is held out."""
    key = hashlib.sha256(str(_INDEX_FORMAT).encode())
    for tar, name in zip(tars, short):
        stat = os.stat(tar)
        key.update(
            f"{os.path.abspath(tar)} {name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
    return os.path.join(storage.user_cache("tars"), f"{key.hexdigest()}.index")


def _load_or_build_index(path: str, tars: list[str], short: list[str], cache: str) -> tuple[_Index, str]:
    """Opens the index of the tars, or makes it if the cache has no whole one.

    Returns:
      The index, and the checksum of its rows, names and captions.
    """
    if os.path.exists(cache) and os.path.getsize(cache) > _DIGEST_BYTES:
        kept = np.memmap(cache, np.uint8, "r")
        if hashlib.sha256(kept[:-_DIGEST_BYTES]).digest() == kept[-_DIGEST_BYTES:].tobytes():
            index = _map_index(cache)
            return index, _checksum(index)
        logging.warning("the index %s is damaged, and is made again", cache)
    logging.info("indexing %d tar shards of %s", len(tars), path)
    index = _build_index(tars, short)
    content = np.array(len(index.rows), _COUNT_DTYPE).tobytes() + index.rows.tobytes() + index.text.tobytes()

    def put(file: IO[bytes]) -> None:
        file.write(content)
        file.write(hashlib.sha256(content).digest())

    try:
        storage.write(cache, put)
    except OSError as error:
        logging.warning("the index of the tars is not kept, and will be made again next time: %s", error)
        return index, _checksum(index)
    return _map_index(cache), _checksum(index)


def _checksum(index: _Index) -> str:
    """Checksum of all but the report, as indexes of format 2 had it."""
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


def _build_index(tars: list[str], short: list[str]) -> _Index:
    left_out, classes = listing.Exclusions(), labels.ClassIndex()
    parts, text = [], bytearray()
    for i, tar in enumerate(tars):
        rows = []
        for sample in members.samples(tar, left_out):
            start = len(text)
            text += sample.name.encode("utf-8", "surrogateescape")
            where = hash_fraction(f"{short[i]}:{sample.name}")
            rows.append((i, classes.add(sample.label), sample.offset, sample.size, start, len(text), where))
            text += sample.caption.encode("utf-8")
        parts.append(np.array(rows, _ROW_DTYPE))
    parts.append(np.array([(0, labels.MISSING, 0, 0, len(text), len(text), 0)], _ROW_DTYPE))
    index = np.concatenate(parts)
    index["label"], names, odd = classes.number(index["label"])
    report = {"names": names, "odd": odd, "left_out": left_out.line()}
    if any(report.values()):
        text += json.dumps(report).encode()
    return _Index(index, np.frombuffer(bytes(text), np.uint8))
