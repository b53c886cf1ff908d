"""Source `hf:<path or hub id>`: data sets of the package `datasets`, read from memory-mapped Arrow files.

The package opens a folder of `save_to_disk`, parquet or Arrow files, or a repository of the hub. It
names the Arrow files of each split, and converts parquet files to Arrow files in its cache first.
Reading needs pyarrow alone, so worker processes do not import the package. No code of a data set
runs: only files of these formats are opened. Images stay encoded.
"""

import errno
import glob
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config.table import HUB_ID
from madformer_jax.data import labels, listing
from madformer_jax.data.source import Examples, Source, fingerprint
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
_LABEL_NAMES = ("label", "labels", "class", "cls")
_CAPTION_NAMES = ("caption", "text", "title", "prompt")
# Words in the path of a parquet or Arrow file, and the split that they mean. Others belong to "train".
_SPLIT_WORDS = {"test": "test", "testing": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SUFFIXES = (".parquet", ".arrow")


class HuggingFace(Source):
    """A split of a data set, or its split "train" if a hash of each row number decides what is held out."""

    splits: tuple[str, ...] = ()
    takes_name = True

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "HuggingFace":
        """Opens the data set `name`, or `data.path` without a name.

        `data.split` is a split of the set. If the set has no split "test", the splits "train", "test"
        and "all" are those of `split_indices`.
        """
        location = name or data.path
        if not location:
            raise ConfigError(
                "config.data.source=hf names no data set: give hf:<path or owner/name>, or config.data.path."
            )
        available = _load(location, data.path if name else "")
        split, hashed = data.split, False
        if "test" not in available and split in ("train", "test", "all"):
            split, hashed = "train" if len(available) > 1 else next(iter(available)), True
        if split not in available:
            can_split = "test" not in available and (len(available) == 1 or "train" in available)
            known = ", ".join(sorted(available)) + "; or train, test, all" * can_split
            raise ConfigError(f"config.data.source=hf:{location} has no split {data.split!r}, only {known}.")
        columns = {kind: data[f"{kind}_column"] for kind in ("image", "label", "caption")}
        source = cls(location, split, available[split], columns, data.max_corrupt)
        source.splits = Source.splits if hashed else ()
        return source

    def __init__(self, location: str, split: str, dataset: Any, columns: Mapping[str, str], max_unlabeled: float):
        """Finds the columns and reads the labels.

        Args:
          location: Path or hub id, for messages.
          split: Name of the split.
          dataset: The `datasets.Dataset`.
          columns: Names of the columns "image", "label" and "caption"; "" to find one by its type and name.
          max_unlabeled: Largest share of rows that may be left out because they have no label.
        """
        self._title = listing.printable(f"hf:{location} {split}")
        self._files = [file["filename"] for file in dataset.cache_files]
        self._table: Any = None
        self._image, label, self._caption = _find_columns(
            f"config.data.source=hf:{location}", dataset.features, columns
        )
        contents = self._open()[self._image]
        if len(contents) != len(dataset):
            raise ConfigError(
                f"config.data.source=hf:{location} is not a plain table: store it again with save_to_disk."
            )
        classes = np.full(len(dataset), labels.MISSING, np.int32)
        names: tuple[str, ...] = ()
        if label:
            classes, names = _read_labels(self._title, self._open()[label], dataset.features[label])
        self._rows = labels.labeled_rows(classes, max_unlabeled, lambda row: f"{self._title}[{row}] has no label")
        self.names = names if (classes >= 0).any() else ()
        self._labels = np.maximum(classes, 0)
        digests = [hashlib.sha256(x.astype("<i8").tobytes()).hexdigest() for x in (classes, _image_sizes(contents))]
        self.fingerprint = fingerprint([*digests, *self.names])

    def _open(self) -> Any:
        """Returns the `pyarrow.Table`, memory-mapped once per process."""
        if self._table is None:
            import pyarrow

            try:
                tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all() for file in self._files]
                self._table = pyarrow.concat_tables(tables)
            except (pyarrow.ArrowException, OSError) as error:
                raise ConfigError(f"{self._title} cannot be read: {first_line(error)}.") from None
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        return len(self._labels if self._rows is None else self._rows)

    def _row_numbers(self, indices: np.ndarray) -> np.ndarray:
        return indices if self._rows is None else self._rows[indices]

    def read(self, indices: np.ndarray) -> Examples:
        rows, contents = self._row_numbers(indices), self._open()[self._image]
        images = [_image_file(contents[row].as_py()) for row in rows.tolist()]
        return Examples({"image": images}, self.labels(indices), self.captions(indices))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._labels[self._row_numbers(indices)]

    def captions(self, indices: np.ndarray) -> list[str]:
        if not self._caption:
            return [""] * len(indices)
        column = self._open()[self._caption]
        contents = [column[row].as_buffer() for row in self._row_numbers(indices).tolist()]
        names = map(self.name, indices.tolist())
        return [storage.decode_text(x.to_pybytes(), name) if x else "" for x, name in zip(contents, names)]

    def name(self, index: int) -> str:
        return f"{self._title}[{self.key(index)}]"

    def key(self, index: int) -> str:
        return str(self._row_numbers(np.array(index)))


def _image_file(value: Any) -> bytes:
    """Returns the encoded image of a cell, b"" (which is corrupt) if it has none.

    A cell holds the bytes, or a dict of them and the path of a local file.
    """
    content, path = (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)
    if content or not path:
        return content or b""
    if not os.path.isfile(path):  # never a pipe or a device
        raise FileNotFoundError(errno.ENOENT, "no such file", path)
    with open(path, "rb") as file:
        return file.read()


def _image_sizes(contents: Any) -> np.ndarray:
    """Returns the bytes of each image (n,), 0 for images in files of their own. Reads no image."""
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_struct(contents.type):
        contents = pc.struct_field(contents, "bytes")
    if pyarrow.types.is_null(contents.type):
        return np.zeros(len(contents), int)
    return np.asarray(pc.fill_null(pc.binary_length(contents), 0))


def _read_labels(title: str, column: Any, feature: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the class of each row, int32 (n,), or `labels.MISSING`, and the names of the classes."""
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())  # may hold what is not UTF-8
        contents = sorted(set(pc.unique(column).to_pylist()) - {None, b""})
        names = [storage.decode_text(content, title) for content in contents]
        column = pc.index_in(column, value_set=pyarrow.array(contents, column.type))
    else:
        names = list(getattr(feature, "names", None) or ())
    try:
        classes = np.asarray(pc.fill_null(column.cast(pyarrow.int64()), labels.MISSING))
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{title}: labels are not classes: {first_line(error)}.") from None
    largest = int(classes.max(initial=-1))
    count = len(names) or largest + 1
    if largest >= (limit := min(count, labels.MAX_CLASSES)):
        raise ConfigError(f"{title}: a label is {largest}: classes count from 0 and are below {limit}.")
    classes = np.where(classes < 0, labels.MISSING, classes).astype(np.int32)
    return classes, tuple(map(listing.printable, names)) or tuple(map(str, range(count)))


def _find_columns(setting: str, features: Mapping[str, Any], chosen: Mapping[str, str]) -> tuple[str, str, str]:
    """Returns the columns of the image, the label and the caption, "" for a set without the latter two."""

    def having(test: Callable[[str, Any], bool]) -> list[str]:
        return [name for name, feature in features.items() if test(str(getattr(feature, "dtype", "")), feature)]

    strings = having(lambda dtype, _: dtype in ("string", "large_string"))
    numbers = having(lambda dtype, _: dtype == "bool" or re.fullmatch(r"u?int\d+", dtype) is not None)
    images = having(lambda _, feature: type(feature).__name__ == "Image")
    binary = having(
        lambda dtype, x: dtype in ("binary", "large_binary") or (isinstance(x, dict) and {"bytes", "path"} <= x.keys())
    )
    classes = having(lambda _, feature: type(feature).__name__ == "ClassLabel")

    def find(kind: str, typed: Sequence[str], suitable: Sequence[str], usual: Sequence[str]) -> str:
        name, others = chosen[kind], ", ".join(features)
        if name and name not in suitable:
            problem = "has another type" if name in features else "does not exist"
            raise ConfigError(f"config.data.{kind}_column={name!r} {problem} in {setting}: its columns are {others}.")
        named = [column for column in suitable if column.lower() in usual]
        matches = [name] if name else [x for x in typed if x in named] or typed or named
        if len(matches) > 1:
            raise ConfigError(
                f"config.data.{kind}_column is empty, and {setting} has several: {', '.join(matches)}. Name one of them."
            )
        if kind == "image" and not matches:
            raise ConfigError(
                f"{setting} has no column of images: its columns are {others}. Set config.data.image_column."
            )
        return matches[0] if matches else ""

    return (
        find("image", images or binary, images + binary, _IMAGE_NAMES),
        find("label", classes, classes + numbers + strings, _LABEL_NAMES),
        find("caption", (), strings, _CAPTION_NAMES),
    )


def _load(location: str, cache: str) -> dict[str, Any]:
    """Opens all splits of a path or hub id and returns split -> `datasets.Dataset`.

    `cache` is the folder for files of the hub; "": the one of `datasets`.
    """
    setting = f"config.data.source=hf:{location}"
    hub_id, _, variant = location.partition(":")
    hub = None if os.path.exists(location) else HUB_ID.fullmatch(hub_id)
    if not os.path.exists(location) and not hub:
        raise ConfigError(f"{setting}: {location} does not exist, and it is not a hub id (owner/name).")
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError(f"{setting} needs the package datasets: pip install 'datasets>=4'.") from None
    try:
        if hub:
            loaded = datasets.load_dataset(hub[1], variant or None, revision=hub[2], cache_dir=cache or None)
        elif any(os.path.exists(os.path.join(location, name)) for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(location, keep_in_memory=False)
        else:
            kind, files = _data_files(setting, location)
            loaded = datasets.load_dataset(kind, data_files=files, keep_in_memory=False)
    except ConfigError:
        raise
    except Exception as error:  # the package, its HTTP library and Arrow raise their own types
        remedy = " Check the name and the network, or download it and give its folder." if hub else ""
        raise ConfigError(f"{setting} cannot be opened: {first_line(error).rstrip('.')}.{remedy}") from None
    return {str(loaded.split or "train"): loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _data_files(setting: str, path: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the format of the data files at a path, "parquet" or "arrow", and the files of each split as patterns."""
    files = listing.list_files(path, listing.Exclusions()) if os.path.isdir(path) else [path]
    files = [file for file in files if listing.suffix(file) in _SUFFIXES]
    kinds = sorted({listing.suffix(file)[1:] for file in files})
    if len(kinds) != 1:
        problem = (
            "both parquet and Arrow files" if kinds else "neither parquet nor Arrow files nor what save_to_disk writes"
        )
        raise ConfigError(f"{setting} holds {problem}.")
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split("[^a-z]+", os.path.relpath(file, path).lower()) if os.path.isdir(path) else []
        split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")
        splits.setdefault(split, []).append(glob.escape(file))
    return kinds[0], splits
