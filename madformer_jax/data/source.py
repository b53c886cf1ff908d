"""What a data source is: random access to images or latents and their labels, the same interface whatever holds them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

Kind = Literal["images", "latents"]


class Examples(NamedTuple):
    """Some records of a source, b of them, as it holds them."""

    arrays: dict[str, Any]  # "image": b encoded files, or uint8 (b, H, W, c); or "mean", "logvar": float16 (b, h, w, C)
    labels: np.ndarray  # int32 (b,)
    captions: list[str]  # "" where there is none
    attributes: np.ndarray | None = None  # int32 (b, A), of a source that has some


class Source(Protocol):
    """Random access to records. Picklable (each worker process gets a copy) and safe to read from several threads."""

    kind: Kind = "images"
    classes: int  # labels run from 0 to classes - 1; 0: unlabelled, every label is 0
    names: tuple[str, ...]  # of the classes; () if unlabelled
    fingerprint: str  # says which records these are, wherever they lie
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()  # name of each, and what its values 0, 1, ... are called
    manifest: Mapping[str, Any] | None = None  # of prepared records; see `records`

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Examples:
        """The records with these numbers, an integer array (b,). Without a number, arrays of their usual shapes and 0 rows.

        Raises:
          OSError: a file cannot be read.
          ConfigError: prepared records are damaged.
        """

    def captions(self, indices: np.ndarray) -> list[str]:
        """Those of the records with these numbers; a source that need not read the images for them has its own way."""
        return self.read(indices).captions

    def name(self, index: int) -> str:
        """Names this record for a message, in one line: its file."""


def hash_fraction(name: str) -> int:
    """A number below 2^64 that a record's name decides, evenly spread."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8])


def test_mask(places: np.ndarray, share: float) -> np.ndarray:
    """Which records the split "test" gets, bool (n,): each by its own `place` (uint64), whatever else there is."""
    return places < share * 2.0**64


class Subset(Source):
    """Some of the records of a source, under new numbers."""

    def __init__(self, source: Source, numbers: np.ndarray):
        self.kind, self.classes, self.names, self.manifest = source.kind, source.classes, source.names, source.manifest
        self.attributes = source.attributes
        self._source, self._numbers = source, numbers
        self.fingerprint = fingerprint(
            [source.fingerprint, hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()]
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, indices: np.ndarray) -> Examples:
        return self._source.read(self._numbers[indices])

    def captions(self, indices: np.ndarray) -> list[str]:
        return self._source.captions(self._numbers[indices])

    def name(self, index: int) -> str:
        return self._source.name(int(self._numbers[index]))


def fingerprint(names: Iterable[str]) -> str:
    """SHA-256 of the number and the names of records, in order."""
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(f"{name}\n".encode("utf-8", "surrogateescape"))
        count += 1
    digest.update(str(count).encode())
    return digest.hexdigest()
