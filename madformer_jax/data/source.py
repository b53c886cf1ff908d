"""The interface of data sources: random access to images or latents and their labels.

`sources.open_source` opens a source, `pipeline` and `modes/prepare.py` read it. A new source is a
class that implements `Source`; add a line for it to `choices.SOURCES`. Modules of other packages ask
a source for its facts and never compare its name.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from ml_collections import ConfigDict

Kind = Literal["images", "latents"]


@dataclasses.dataclass
class Examples:
    """b records of a source, in the form in which the source stores them."""

    arrays: dict[str, Any]  # "image": b encoded files, or uint8 (b, H, W, c); or "mean", "logvar": float16
    # (b, h, w, C); source npy: "mean" alone, float32
    labels: np.ndarray  # int32 (b,)
    captions: list[str] = dataclasses.field(default_factory=list)  # "" for a record without a caption
    attributes: np.ndarray | None = None  # int32 (b, A); None for a source without attributes

    def __post_init__(self) -> None:
        self.captions = self.captions or [""] * len(self.labels)


class Source(Protocol):
    """Random access to records.

    Sources can be pickled, because each worker process gets a copy. Several threads may read at the
    same time. The first group of fields can be read from the class without opening data. An instance may
    replace `splits` and `attributes`.
    """

    splits: tuple[str, ...] = ("train", "test")  # see `split_indices`; () if `open` reads only the records of a split
    held_out: tuple[str, ...] = ("test", "composition")  # splits that training refuses
    takes_name: bool = False  # whether `data.source` may be "source:name"
    kinds: tuple[Kind, ...] = ("images",)  # that data sets of the source may have
    reads_buckets: bool = False  # whether `data.path` may lie in a bucket
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()  # name of each, and the names of its values 0, 1, ...

    kind: Kind = "images"
    names: tuple[str, ...]  # of the classes; () if unlabeled
    manifest: Mapping[str, Any] | None = None  # of prepared records; see `records`

    def __init__(self, path: str = ""):
        """Finds the records in `data.path`, see `open`."""

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes. Labels run from 0 to classes - 1. 0: unlabeled, every label is 0."""
        return len(self.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the records and their order, wherever the files are stored.

        A source whose records depend on more than their names overrides it.
        """
        return fingerprint(map(self.key, range(len(self))))

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Source":
        """Opens the records of all splits, or of `data.split` if the data set has splits of its own.

        Args:
          data: The section `config.data`.
          name: Text after the colon in `data.source`, "" without a colon.

        Raises:
          ConfigError: The data set does not exist or cannot be read, or a package is missing.
        """
        return cls(data.path)

    @classmethod
    def enlarge(cls, data: ConfigDict, factor: int) -> None:
        """Changes `data` so that the source has `factor` times as many records, if it can make them."""
        return

    @classmethod
    def inconsistency(cls, name: str, images: np.ndarray) -> np.ndarray | None:
        """Measures how far pictures break the structure that all records of the source have.

        Args:
          name: Text after the colon in `data.source`.
          images: uint8 (n, H, W, c).

        Returns:
          Distances (n,), 0 for a real picture; None for a source without such a structure.
        """
        return None

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Examples:
        """Returns the records at `indices`, an integer array (b,).

        For b = 0, arrays have their usual shapes with 0 rows.

        Raises:
          OSError: A file cannot be read.
          ConfigError: Prepared records are damaged.
        """

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of the records at `indices`, int32 (b,).

        Sources that can do so without reading the images override this method.
        """
        return self.read(indices).labels

    def captions(self, indices: np.ndarray) -> list[str]:
        """Returns the captions of the records at `indices`.

        Sources that can do so without reading the images override this method.
        """
        return self.read(indices).captions

    def captioned_attributes(self, indices: np.ndarray) -> np.ndarray | None:
        """Returns the attributes of records, int32 (b, A), with 0 for those that the captions omit.

        None for a source without attributes.
        """
        return self.read(indices).attributes

    def name(self, index: int) -> str:
        """Returns the name of a record for messages, such as its file, in one line."""

    def key(self, index: int) -> str:
        """Returns the name of a record that `split_indices` hashes.

        It must not depend on where the data set is stored.
        """
        return self.name(index)

    def split_indices(self, test_share: float) -> np.ndarray:
        """Returns the split of each record as an index into `splits`, int (n,).

        Each record is assigned by the hash of its `key`, so that adding or removing others changes
        nothing for it.

        Args:
          test_share: Expected share of the split "test".
        """
        hashes = np.fromiter(map(hash_fraction, map(self.key, range(len(self)))), np.uint64, len(self))
        return test_mask(hashes, test_share).astype(int)


def hash_fraction(name: str) -> int:
    """Hashes a record's name to a number in [0, 2^64), uniformly distributed."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8])


def test_mask(hashes: np.ndarray, share: float) -> np.ndarray:
    """Returns which records belong to the split "test", bool (n,), by `hash_fraction` of their keys, uint64 (n,)."""
    return hashes < share * 2.0**64


class Subset(Source):
    """A selection of the records of a source, renumbered from 0."""

    splits = ()

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

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._source.labels(self._numbers[indices])

    def captions(self, indices: np.ndarray) -> list[str]:
        return self._source.captions(self._numbers[indices])

    def captioned_attributes(self, indices: np.ndarray) -> np.ndarray | None:
        return self._source.captioned_attributes(self._numbers[indices])

    def name(self, index: int) -> str:
        return self._source.name(int(self._numbers[index]))


def fingerprint(names: Iterable[str]) -> str:
    """Computes the SHA-256 of the names of records, in order, and of their number."""
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(f"{name}\n".encode("utf-8", "surrogateescape"))
        count += 1
    digest.update(str(count).encode())
    return digest.hexdigest()
