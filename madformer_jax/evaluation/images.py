"""Sets of existing images to score: a data source, a folder of images, or .npz files.

`modes.evaluate` opens the set that `evaluate.images` names, and `modes.reference` opens the data
source. Images are read in batches by index. A new kind of set is a function that returns an
`ImageSet` and a branch in `open_images`.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.data import folder, listing, pipeline, preprocess, sources
from madformer_jax.data.source import Source, fingerprint
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.evaluation import degradations, shards
from madformer_jax.evaluation.networks.registry import NetworkOutputs
from madformer_jax.runtime import progress, storage


class ImageBatch(NamedTuple):
    """The readable images of a batch."""

    images: np.ndarray  # uint8 (b, H, W, c)
    labels: np.ndarray  # int32 (b,)
    numbers: np.ndarray  # (b,) indices in the set
    unreadable: tuple[str, ...] = ()  # name and error of each unreadable image


class ImageSet(NamedTuple):
    """A set of images."""

    protocol: dict[str, str]  # identifies the set in the protocol of a score
    n: int
    classes: int  # labels are 0 to classes - 1; 0 if the images are unlabeled
    read: Callable[[np.ndarray], ImageBatch]  # reads the images with ascending indices (b,)
    digest: Callable[[int], str]  # hashes the first n images and their labels; collective


class UnreadableImages:
    """The unreadable images of a set, the same in all processes."""

    def __init__(self, n: int, max_fraction: float):
        """Initializes an empty record.

        Args:
          max_fraction: Largest fraction of unreadable images, `data.max_corrupt`.
        """
        self.errors: list[str] = []
        self._n, self._max_fraction = n, max_fraction

    def add(self, errors: Sequence[str]) -> None:
        """Adds images, each by its name and error.

        Raises:
          ConfigError: Too many images are unreadable.
        """
        self.errors += errors
        if len(self.errors) > self._max_fraction * self._n:
            raise ConfigError(
                f"{self.errors[-1]} cannot be read: {len(self.errors)} of {self._n} images, more than config.data.max_corrupt="
                f"{self._max_fraction}. Repair or remove the files, or raise the limit."
            )


def extract_missing_shards(
    data: ImageSet,
    extract: Callable[[np.ndarray], NetworkOutputs],
    unreadable: UnreadableImages,
    missing: Sequence[shards.Shard],
) -> Iterator[shards.Arrays]:
    """Yields the arrays of each missing shard.

    Each process reads a slice of a shard and prefetches its slice of the next one.

    Args:
      extract: Computes a network's outputs, see `registry.make_extractor`.
      unreadable: Collects the unreadable images.

    Raises:
      ConfigError: Too many images are unreadable, or a process cannot read its slice.
    """
    slices = (np.arange(*shard)[shards.process_slice(shard.n)] for shard in missing)
    for batch in shards.prefetch(_read_or_error(data.read, numbers) for numbers in slices):
        batch = shards.sync_errors(batch)
        arrays = shards.allgather_rows(shards.extract_features(extract, batch.images, batch.labels))
        text = "".join(f"{error}\n" for error in batch.unreadable).encode("utf-8", "surrogateescape")
        errors = shards.allgather_rows({shards.UNREADABLE_KEY: np.frombuffer(text, np.uint8)})
        unreadable.add(errors[shards.UNREADABLE_KEY].tobytes().decode("utf-8", "surrogateescape").splitlines())
        yield arrays | errors


def _read_or_error(read: Callable[[np.ndarray], ImageBatch], numbers: np.ndarray) -> ImageBatch | ConfigError:
    try:
        return read(numbers)
    except ConfigError as error:
        return error


def from_source(c: ConfigDict, split: str, shuffled: bool, config_field: str = "evaluate.images") -> ImageSet:
    """Opens the images of `config.data`'s source, with the preprocessing of the config.

    Args:
      split: The split, instead of `data.split`.
      shuffled: If True, indices follow a fixed random order, so that the first n images are a
        random sample.
      config_field: Config field that requests the split, for the error.

    Raises:
      ConfigError: The source does not open, is empty, or holds latents.
    """
    try:
        source = sources.open_source(c, split)
    except ConfigError as error:
        raise ConfigError(f"config.{config_field} asks for split {split!r}: {error}") from None
    if source.kind != "images":
        raise ConfigError(
            f"config.data.path={c.data.path!r} holds latents: statistics need the images themselves; give those as "
            "config.data.source and config.data.path."
        )
    if not len(source):
        raise ConfigError(f"config.data.source={c.data.source}, split {split!r}, is empty.")
    order = np.random.RandomState(2020).permutation(len(source)) if shuffled else np.arange(len(source))
    protocol = {"source": c.data.source, "split": split, "fingerprint": source.fingerprint}
    preprocessor = pipeline.make_preprocessor(c)
    return ImageSet(
        protocol,
        len(source),
        source.classes,
        lambda numbers: _read(source, preprocessor, numbers, order[numbers]),
        lambda n: _hash_records(source, order[:n]),
    )


def _read(
    source: Source, preprocessor: preprocess.Preprocessor, numbers: np.ndarray, records: np.ndarray
) -> ImageBatch:
    """Reads records of a source, which are the images with the indices `numbers`.

    If a batch fails, its images are read one by one to find the unreadable ones.
    """
    try:
        batch = source.read(records)
        return ImageBatch(preprocessor.process_batch(batch.arrays["image"]), batch.labels, numbers)
    except (preprocess.CorruptImageError, OSError) as error:
        if len(numbers) > 1:
            images, labels, readable, unreadable = zip(
                *(_read(source, preprocessor, *single) for single in zip(numbers[:, None], records[:, None]))
            )
            return ImageBatch(
                np.concatenate(images), np.concatenate(labels), np.concatenate(readable), sum(unreadable, ())
            )
        reason = " ".join(f"{source.name(int(records[0]))} ({first_line(error)})".split())
        logging.warning("skipped unreadable image %s", reason)
        empty = np.zeros((0, preprocessor.size, preprocessor.size, preprocessor.channels), np.uint8)
        return ImageBatch(empty, np.zeros(0, np.int32), numbers[:0], (reason,))


def _hash_records(source: Source, records: np.ndarray) -> str:
    """Hashes the labels and the encoded images of records. Each process hashes a slice of them."""
    process_records = records[shards.process_slice(len(records))]
    with progress.log_while("hashing the images"):
        digests = b"".join(_hash_record(source, record) for record in process_records.tolist())
    rows = np.frombuffer(digests, np.uint8).reshape(len(process_records), hashlib.sha256().digest_size)
    return hashlib.sha256(shards.allgather_rows({"digests": rows})["digests"].tobytes()).hexdigest()


def _hash_record(source: Source, record: int) -> bytes:
    try:
        batch = source.read(np.array([record]))
    except (OSError, ConfigError):  # `_read` reports the error later.
        return hashlib.sha256(b"unreadable").digest()
    digest = hashlib.sha256(batch.labels.astype("<i4").tobytes())
    digest.update(batch.arrays["image"][0])
    return digest.digest()


def open_images(c: ConfigDict) -> ImageSet:
    """Opens the images that `config.evaluate.images` names.

    The value is "data:SPLIT", a .npz file, or a folder of .npz files or images.

    Raises:
      ConfigError: The images do not exist, or are not uint8 (n, H, W, c) of the config's size.
    """
    name = c.evaluate.images
    if name.startswith("data:"):
        images = from_source(c, name.removeprefix("data:"), shuffled=True)
    else:
        paths = _npz_paths(name)
        images = _from_npz_files(c, name, paths) if paths else _from_image_folder(c, name)
    return _degrade(images, c.evaluate.degrade) if c.evaluate.degrade else images


def _npz_paths(name: str) -> list[str]:
    """Returns the sorted .npz files that `name` denotes; empty for a folder of images."""
    if not os.path.isdir(name):
        if os.path.isfile(name) and name.endswith(".npz"):
            return [name]
        problem = "is neither a .npz file nor a folder" if os.path.exists(name) else "does not exist"
        raise ConfigError(
            f"config.evaluate.images={name!r} {problem}: give data:SPLIT, a .npz file, or a folder of .npz files or images."
        )
    with storage.wrap_errors(f"config.evaluate.images={name!r} cannot be listed"):
        files = [file for file in sorted(os.listdir(name)) if file.endswith(".npz") and not listing.is_hidden(file)]
        return [os.path.join(name, file) for file in files]


def _from_image_folder(c: ConfigDict, path: str) -> ImageSet:
    source, preprocessor = folder.Folder(path, "evaluate.images"), pipeline.make_preprocessor(c)
    protocol = {"folder": os.path.basename(os.path.abspath(path)), "fingerprint": source.fingerprint}
    return ImageSet(
        protocol, len(source), 0, lambda numbers: _read(source, preprocessor, numbers, numbers),
        lambda n: _hash_records(source, np.arange(n)),
    )  # fmt: skip


class _NpzReader:
    """Reader of single rows of the array `images` or `arr_0` of a .npz file.

    Attributes:
      shape: Shape (n, H, W, c) of the array.
      checksum: CRC-32 of the array.
      labels: The array `labels`, or None if the file has no labels. In files of guided-diffusion,
        which have `arr_0`, it is `arr_1`.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                self._name = next(name for name in ("images.npy", "arr_0.npy") if name in names)
                self.checksum = archive.getinfo(self._name).CRC
                with archive.open(self._name) as file:
                    shape, fortran, dtype = preprocess.read_array_header(file)
                    self._start = file.tell()
                unnamed = "arr_1.npy" if self._name == "arr_0.npy" else ""
                self.labels = _read_labels(
                    archive, path, next((x for x in ("labels.npy", unnamed) if x in names), ""), shape[:1]
                )
        except ConfigError:
            raise
        except StopIteration:
            raise ConfigError(f"{path} holds neither 'images' nor 'arr_0'.") from None
        except Exception as error:  # A damaged archive raises many types of errors.
            raise ConfigError(f"{path} cannot be read as a .npz archive ({type(error).__name__}: {error}).") from None
        if fortran or dtype != np.uint8 or len(shape) != 4:
            raise ConfigError(f"{path}: images are {dtype} {shape}: they must be uint8 (n, H, W, c).")
        self.shape = shape

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Reads the images uint8 (b, H, W, c) with ascending indices (b,).

        Raises:
          ConfigError: The file is damaged.
        """
        size = int(np.prod(self.shape[1:]))
        out = np.empty((len(numbers), size), np.uint8)
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._name) as file:
                for row, number in zip(out, numbers.tolist()):
                    file.seek(self._start + number * size)
                    row[:] = np.frombuffer(file.read(size), np.uint8)
        except Exception as error:  # A damaged archive raises many types of errors.
            raise ConfigError(f"{self._path} is damaged ({type(error).__name__}: {first_line(error)}).") from None
        return out.reshape(-1, *self.shape[1:])


def _read_labels(archive: zipfile.ZipFile, path: str, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Reads the labels, the member `name` of an open .npz archive, or returns None if it has none (`name` is "").

    Raises:
      ConfigError: The array `labels` does not have one label per image.
    """
    if not name:
        return None
    with archive.open(name) as file:
        actual_shape, _, dtype = preprocess.read_array_header(file)
    # An array without a name can be anything.
    if name == "arr_1.npy" and (actual_shape != shape or dtype.kind not in "iu"):
        logging.warning(
            "%s: arr_1 is %s %s, not one class per image: it is not read as labels", path, dtype, actual_shape
        )
        return None
    if actual_shape != shape:
        raise ConfigError(f"{path}: labels are {actual_shape} for {shape[0]} images: they must be one each.")
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_labels(path: str, labels: np.ndarray) -> np.ndarray:
    """Returns labels (n,) as int32.

    Raises:
      ConfigError: Labels are not whole numbers from 0.
    """
    if labels.dtype.kind in "iufb":
        with np.errstate(invalid="ignore"):  # infinite labels fail the check below
            classes = labels.astype(np.int32)
        if (classes == labels).all() and (classes >= 0).all():
            return classes
    raise ConfigError(f"{path}: labels of {labels.dtype} are not all classes: they must be whole numbers from 0.")


def _from_npz_files(c: ConfigDict, name: str, paths: list[str]) -> ImageSet:
    readers = [_NpzReader(path) for path in paths]
    shape = (c.data.image_size, c.data.image_size, c.data.channels)
    for reader, path in zip(readers, paths):
        if reader.shape[1:] != shape:
            raise ConfigError(f"{path}: images are {reader.shape[1:]}, and the config's are {shape}.")
    ends = np.cumsum([reader.shape[0] for reader in readers])
    labels_by_path = {path: reader.labels for reader, path in zip(readers, paths) if reader.labels is not None}
    if labels_by_path and len(labels_by_path) < len(readers):
        unlabeled = next(path for path in paths if path not in labels_by_path)
        logging.warning("%s has no labels, so the labels of the other files are ignored", unlabeled)
    # A model without classes writes label 0 for each image.
    labeled = bool(c.model.classes) and len(labels_by_path) == len(readers)
    labels = np.zeros(int(ends[-1]), np.int32)
    if labeled:
        labels = np.concatenate([_check_labels(path, array) for path, array in labels_by_path.items()])

    def read(numbers: np.ndarray) -> ImageBatch:
        images = np.empty((len(numbers), *shape), np.uint8)
        file_index = np.searchsorted(ends, numbers, side="right")
        for k in np.unique(file_index):
            first = ends[k] - readers[k].shape[0]
            images[file_index == k] = readers[k].rows(numbers[file_index == k] - first)
        return ImageBatch(images, labels[numbers], numbers)

    content = fingerprint(f"{reader.shape[0]} {reader.checksum:08x}" for reader in readers)
    protocol = {"files": os.path.basename(os.path.abspath(name)), "fingerprint": content}
    digest = hashlib.sha256(content.encode() + labels.tobytes()).hexdigest()
    return ImageSet(protocol, int(ends[-1]), int(labels.max(initial=-1)) + 1 if labeled else 0, read, lambda n: digest)


def _degrade(images: ImageSet, degradation: str) -> ImageSet:
    """Degrades the images, see `degradations.parse`."""
    degrade = degradations.parse(degradation)

    def read(numbers: np.ndarray) -> ImageBatch:
        batch = images.read(numbers)
        return batch._replace(images=degrade(batch.images, batch.numbers)) if len(batch.images) else batch

    return images._replace(protocol={**images.protocol, "degrade": degradation}, read=read)
