"""Images that exist, to be judged: a data source's, a folder's, those of .npz files; read by number, never all at once."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import ImageFilter

from madformer_jax.data import listing, pipeline, preprocess, sources
from madformer_jax.data.source import Source, fingerprint
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.evaluation import shards
from madformer_jax.evaluation.networks.registry import NetworkOutputs
from madformer_jax.runtime import progress, storage


class ImageBatch(NamedTuple):
    """Some images of a set, without those that cannot be read."""

    images: np.ndarray  # uint8 (b, H, W, c)
    labels: np.ndarray  # int32 (b,)
    numbers: np.ndarray  # (b,)
    unread: tuple[str, ...] = ()  # name and reason of each that is left out


class ImageSet(NamedTuple):
    """A set of images."""

    about: dict[str, str]  # which ones, for the protocol
    n: int
    classes: int  # labels run from 0 to classes - 1; 0: unlabelled
    read: Callable[[np.ndarray], ImageBatch]  # of numbers (b,), ascending
    digest: Callable[[int], str]  # of the content of the first n, and of their labels; every process calls it


class UnreadableImages:
    """The images of a set of n that cannot be read: of all processes the same, for each to stop where they are too many."""

    def __init__(self, n: int, most: float):
        """most: share of the n that may be left out, `data.max_corrupt`."""
        self.told: list[str] = []
        self._n, self._most = n, most

    def add(self, told: Sequence[str]) -> None:
        """Takes in more of them, name and reason.

        Raises:
          ConfigError: they are too many; names one.
        """
        self.told += told
        if len(self.told) > self._most * self._n:
            raise ConfigError(
                f"{self.told[-1]} cannot be read: {len(self.told)} of {self._n} images, more than config.data.max_corrupt="
                f"{self._most}. Mend or remove the files, or allow more."
            )


def extract_missing_shards(
    data: ImageSet,
    extract: Callable[[np.ndarray], NetworkOutputs],
    unread: UnreadableImages,
    missing: Sequence[shards.Shard],
) -> Iterator[shards.Arrays]:
    """Yields what is kept of each missing part. Every process reads a share of a part, and the next part ahead.

    Raises:
      ConfigError: As `Unread.add`; or some process cannot read its share.
    """
    shares = (np.arange(*part)[shards.process_slice(part.n)] for part in missing)
    for rows in shards.prefetch(_read_or_error(data.read, numbers) for numbers in shares):
        rows = shards.sync_errors(rows)
        found = shards.allgather_rows(shards.extract_features(extract, rows.images, rows.labels))
        text = "".join(f"{one}\n" for one in rows.unread).encode("utf-8", "surrogateescape")
        told = shards.allgather_rows({shards.UNREADABLE_KEY: np.frombuffer(text, np.uint8)})
        unread.add(told[shards.UNREADABLE_KEY].tobytes().decode("utf-8", "surrogateescape").splitlines())
        yield found | told


def _read_or_error(read: Callable[[np.ndarray], ImageBatch], numbers: np.ndarray) -> ImageBatch | ConfigError:
    try:
        return read(numbers)
    except ConfigError as error:
        return error


def from_source(c: ConfigDict, split: str, shuffled: bool, asked: str = "evaluate.images") -> ImageSet:
    """The images of `config.data`'s source, through the preprocessing table.

    Args:
      c: the config.
      split: takes the place of `data.split`.
      shuffled: numbered in an order drawn once and for all, so that the first n are a fair choice.
      asked: the field that asks for the split.

    Raises:
      ConfigError: the source does not open or holds latents.
    """
    c = c.copy_and_resolve_references()
    c.data.split = split
    try:
        source = sources.open_source(c)
    except ConfigError as error:
        raise ConfigError(f"config.{asked} asks for split {split!r}: {error}") from None
    if source.kind != "images":
        raise ConfigError(
            f"config.data.path={c.data.path!r} holds latents: statistics need the images themselves; give those as "
            "config.data.source and config.data.path."
        )
    if not len(source):
        raise ConfigError(f"config.data.source={c.data.source}, split {split!r}, is empty.")
    order = np.random.RandomState(2020).permutation(len(source)) if shuffled else np.arange(len(source))
    about = {"source": c.data.source, "split": split, "fingerprint": source.fingerprint}
    table = pipeline.make_preprocessor(c)
    return ImageSet(
        about,
        len(source),
        source.classes,
        lambda numbers: _read(source, table, numbers, order[numbers]),
        lambda n: _hash_records(source, order[:n]),
    )


def _read(source: Source, table: preprocess.Preprocessor, numbers: np.ndarray, records: np.ndarray) -> ImageBatch:
    """The images with these numbers, which are those records of the source."""
    try:
        found = source.read(records)
        return ImageBatch(table.process_batch(found.arrays["image"]), found.labels, numbers)
    except (preprocess.CorruptImageError, OSError) as error:
        if len(numbers) > 1:
            images, labels, read, unread = zip(
                *(_read(source, table, *one) for one in zip(numbers[:, None], records[:, None]))
            )
            return ImageBatch(np.concatenate(images), np.concatenate(labels), np.concatenate(read), sum(unread, ()))
        reason = " ".join(f"{source.name(int(records[0]))} ({first_line(error)})".split())
        logging.warning("passed over %s", reason)
        empty = np.zeros((0, table.size, table.size, table.channels), np.uint8)
        return ImageBatch(empty, np.zeros(0, np.int32), numbers[:0], (reason,))


def _hash_records(source: Source, records: np.ndarray) -> str:
    """Hashes the labels of records and the bytes that their images are read from. Every process hashes a share."""
    mine = records[shards.process_slice(len(records))]
    with progress.log_while("hashing the images"):
        digests = b"".join(_hash_record(source, record) for record in mine.tolist())
    rows = np.frombuffer(digests, np.uint8).reshape(len(mine), hashlib.sha256().digest_size)
    return hashlib.sha256(shards.allgather_rows({"digests": rows})["digests"].tobytes()).hexdigest()


def _hash_record(source: Source, record: int) -> bytes:
    try:
        found = source.read(np.array([record]))
    except (OSError, ConfigError):  # reading it to judge it says why
        return hashlib.sha256(b"unreadable").digest()
    digest = hashlib.sha256(found.labels.astype("<i4").tobytes())
    digest.update(found.arrays["image"][0])
    return digest.digest()


def open_images(c: ConfigDict) -> ImageSet:
    """The images that `config.evaluate.images` names: "data:SPLIT", a .npz file, or a folder of .npz files or images.

    Raises:
      ConfigError: there are none, or they are not uint8 (n, H, W, c) of the config's size.
    """
    name = c.evaluate.images
    if name.startswith("data:"):
        found = from_source(c, name.removeprefix("data:"), shuffled=True)
    else:
        shards = _shard_paths(name)
        found = _from_npz_files(c, name, shards) if shards else _from_image_folder(c, name)
    return _degrade(found, c.evaluate.degrade)


def _shard_paths(name: str) -> list[str]:
    """The .npz files that a path names, sorted; empty for a folder without any."""
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
    source, table = sources.Folder(path, "evaluate.images"), pipeline.make_preprocessor(c)
    about = {"folder": os.path.basename(os.path.abspath(path)), "fingerprint": source.fingerprint}
    return ImageSet(
        about, len(source), 0, lambda numbers: _read(source, table, numbers, numbers),
        lambda n: _hash_records(source, np.arange(n)),
    )  # fmt: skip


class _NpzReader:
    """The rows of `images` (or `arr_0`) in a .npz file, read in order without the rest of the file in memory.

    `labels` has their classes; in the files of guided-diffusion, which have `arr_0`, it is `arr_1`. It is None without labels.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                self._name = next(name for name in ("images.npy", "arr_0.npy") if name in names)
                self.checksum = archive.getinfo(self._name).CRC
                with archive.open(self._name) as file:
                    shape, fortran, dtype = _npy_header(file)
                    self._start = file.tell()
                second = "arr_1.npy" if self._name == "arr_0.npy" else ""
                self.labels = _read_labels(
                    archive, path, next((x for x in ("labels.npy", second) if x in names), ""), shape[:1]
                )
        except ConfigError:
            raise
        except StopIteration:
            raise ConfigError(f"{path} holds neither 'images' nor 'arr_0'.") from None
        except Exception as error:  # a broken archive raises almost any kind
            raise ConfigError(f"{path} cannot be read as a .npz archive ({type(error).__name__}: {error}).") from None
        if fortran or dtype != np.uint8 or len(shape) != 4:
            raise ConfigError(f"{path}: images are {dtype} {shape}: they must be uint8 (n, H, W, c).")
        self.shape = shape

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        size = int(np.prod(self.shape[1:]))
        out = np.empty((len(numbers), size), np.uint8)
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._name) as file:
                for row, number in zip(out, numbers.tolist()):
                    file.seek(self._start + number * size)
                    row[:] = np.frombuffer(file.read(size), np.uint8)
        except Exception as error:  # a broken archive raises almost any kind
            raise ConfigError(f"{self._path} is damaged ({type(error).__name__}: {first_line(error)}).") from None
        return out.reshape(-1, *self.shape[1:])


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_labels(archive: zipfile.ZipFile, path: str, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The labels in a member of a .npz file, an array of this shape; None without a member.

    Raises:
      ConfigError: `labels` are not one an image.
    """
    if not name:
        return None
    with archive.open(name) as file:
        found, _, dtype = _npy_header(file)
    if name == "arr_1.npy" and (found != shape or dtype.kind not in "iu"):  # an array without a name may be anything
        logging.warning("%s: arr_1 is %s %s, not one class an image: it is not read as labels", path, dtype, found)
        return None
    if found != shape:
        raise ConfigError(f"{path}: labels are {found} for {shape[0]} images: they must be one each.")
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_labels(path: str, labels: np.ndarray) -> np.ndarray:
    """Labels (n,) as int32.

    Raises:
      ConfigError: They are not whole numbers from 0.
    """
    if labels.dtype.kind in "iufb":
        with np.errstate(invalid="ignore"):  # of infinite ones
            classes = labels.astype(np.int32)
        if (classes == labels).all() and (classes >= 0).all():
            return classes
    raise ConfigError(f"{path}: labels of {labels.dtype} are not all classes: they must be whole numbers from 0.")


def _from_npz_files(c: ConfigDict, name: str, paths: list[str]) -> ImageSet:
    shards = [_NpzReader(path) for path in paths]
    shape = (c.data.image_size, c.data.image_size, c.data.channels)
    for shard, path in zip(shards, paths):
        if shard.shape[1:] != shape:
            raise ConfigError(f"{path}: images are {shard.shape[1:]}, and the config's are {shape}.")
    ends = np.cumsum([shard.shape[0] for shard in shards])
    known = {path: shard.labels for shard, path in zip(shards, paths) if shard.labels is not None}
    if known and len(known) < len(shards):
        lacking = next(path for path in paths if path not in known)
        logging.warning("%s has no labels, and other files have: none are used", lacking)
    # A model without classes writes 0 for each image.
    labelled = bool(c.model.classes) and len(known) == len(shards)
    labels = np.zeros(int(ends[-1]), np.int32)
    if labelled:
        labels = np.concatenate([_check_labels(path, found) for path, found in known.items()])

    def read(numbers: np.ndarray) -> ImageBatch:
        images = np.empty((len(numbers), *shape), np.uint8)
        which = np.searchsorted(ends, numbers, side="right")
        for k in np.unique(which):
            images[which == k] = shards[k].rows(numbers[which == k] - (ends[k] - shards[k].shape[0]))
        return ImageBatch(images, labels[numbers], numbers)

    found = fingerprint(f"{shard.shape[0]} {shard.checksum:08x}" for shard in shards)
    about = {"files": os.path.basename(os.path.abspath(name)), "fingerprint": found}
    digest = hashlib.sha256(found.encode() + labels.tobytes()).hexdigest()
    return ImageSet(about, int(ends[-1]), int(labels.max(initial=-1)) + 1 if labelled else 0, read, lambda n: digest)


def _degrade(images: ImageSet, how: str) -> ImageSet:
    """The images with noise ("noise:16": deviation of 16 of 255) or blur ("blur:1.5": radius in pixels); "": as they are."""
    if not how:
        return images
    kind, _, text = how.partition(":")
    try:
        strength = float(text)
    except ValueError:
        strength = -1
    if kind not in ("noise", "blur") or strength <= 0:
        raise ConfigError(
            f"config.evaluate.degrade={how!r}: it must be noise:DEVIATION or blur:RADIUS, as in noise:16."
        )

    def read(numbers: np.ndarray) -> ImageBatch:
        found = images.read(numbers)
        pixels = found.images
        if not len(pixels):
            return found
        if kind == "blur":
            blur = ImageFilter.GaussianBlur(strength)
            each = [preprocess.to_pil(x).filter(blur) for x in pixels]
            return found._replace(images=np.stack([np.asarray(x) for x in each]).reshape(pixels.shape))
        noise = [np.random.default_rng(int(n)).normal(0, strength, pixels.shape[1:]) for n in found.numbers]
        return found._replace(images=np.clip(np.round(pixels + np.stack(noise)), 0, 255).astype(np.uint8))

    return images._replace(about={**images.about, "degrade": how}, read=read)
