"""The file of --mode=reference: what scores compare with, and the protocol by which it was made.

A .npz with `mu` (d,), `sigma` (d, d) over n - 1, up to `FEATURES` vectors `features` (m, d) with their `labels`, `counts` of
each class, the mean `profile` of `seams.difference_profiles`, and `protocol` as JSON. ADM's files have `mu` and `sigma` alone.

The features of all other images follow in arrays `others_...`. Only the search for copies reads them, one at a time.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import scores
from madformer_jax.evaluation.scores import Gaussian
from madformer_jax.evaluation.shards import Arrays
from madformer_jax.runtime import storage

MAX_STORED_FEATURES = 50_000  # vectors that most scores compare with
_EXTRA_PREFIX = "others_"  # begins the names of the arrays with the remaining vectors


class Reference(NamedTuple):
    """Statistics of a set of images."""

    protocol: Mapping[str, Any]  # source, image, network, n; of other people's files only what they say
    digest: str  # of all of it
    gaussian: Gaussian
    features: np.ndarray | None  # (m, d) float32; None where only the statistics are known
    profile: np.ndarray | None  # (H - 1 + W - 1,)
    path: str = ""
    others: tuple[str, ...] = ()  # names of the arrays in the file that hold the remaining features
    stored: int = 0  # images whose features the file holds

    @property
    def of(self) -> np.ndarray | Gaussian:
        """What the Frechet distance takes: of few images their features, which are smaller and exact."""
        whole = self.features is not None and self.protocol.get("n") == len(self.features)
        return self.features if self.features is not None and whole else self.gaussian


def save(path: str, protocol: Mapping[str, Any], each: Callable[[], Iterator[Arrays]], classes: int) -> str:
    """Writes the statistics of images that `parts.look` saw; returns the digest. Memory holds a part and what is kept.

    Args:
      path: the file.
      protocol: how they were made, JSON.
      each: a new pass over the parts: features (m, d), labels (m,), profile (1, .) and, for its mean, `weight` (1,).
      classes: of the source; 0: unlabelled.

    Raises:
      ConfigError: the features are not finite, or of less than two images.
    """
    total: Any = 0.0
    labels, profiles, weights = [], [], []
    for part in each():
        x = scores.validate_features(part["features"], "reference", at_least=0, needed_for="")
        total += x.sum(axis=0, dtype=np.float64)
        labels.append(part["labels"])
        profiles.append(part["profile"])
        weights.append(part["weight"])
    classes_of = np.concatenate(labels)
    n = len(classes_of)
    if n < 2:
        raise ConfigError(f"a reference of {n} images: a covariance needs two at least.")
    mean = total / n
    chosen = np.zeros(n, bool)
    chosen[np.random.RandomState(2020).permutation(n)[:MAX_STORED_FEATURES]] = True
    digests = []

    def put(file: IO[bytes]) -> None:
        scatter, kept, first = np.zeros(mean.shape * 2), [], 0
        with zipfile.ZipFile(file, "w") as archive:
            for i, x in enumerate(_merge_small_batches(each())):
                centred = x - mean
                scatter += centred.T @ centred
                here = chosen[first : first + len(x)]
                kept.append(x[here])
                first += len(x)
                if not here.all():
                    _append_array(archive, f"{_EXTRA_PREFIX}{i:06d}", x[~here].astype(np.float32))
            others = list(archive.infolist())
            arrays = {
                "mu": mean,
                "sigma": scatter / (n - 1),
                "features": np.concatenate(kept).astype(np.float32),
                "labels": classes_of[chosen],
                "counts": np.bincount(classes_of, minlength=classes) if classes else np.zeros(0, np.int64),
                "profile": np.average(np.concatenate(profiles), axis=0, weights=np.concatenate(weights)),
                "protocol": np.array(json.dumps(dict(protocol) | {"n": n}, sort_keys=True)),
            }
            for name, array in arrays.items():
                _append_array(archive, name, array)
        digests.append(_hash_content(arrays, others))

    storage.write(path, put)
    return digests[-1]


def _append_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Adds an array as `np.savez` does, which wants all of them at once."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _merge_small_batches(each: Iterator[Arrays]) -> Iterator[np.ndarray]:
    """Features of parts, some thousand images at once: adding up a matrix for each few would take long."""
    waiting: list[np.ndarray] = []
    for part in each:
        waiting.append(part["features"])
        if sum(map(len, waiting)) >= scores.TILE_ROWS:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def load(path: str) -> Reference:
    """The reference in a file, ours or one with `mu` and `sigma`.

    Raises:
      ConfigError: there is none, it is damaged, or holds no statistics.
    """
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError(f"there is no reference at {path}: make it with --mode=reference, or set evaluate.reference.")
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith(_EXTRA_PREFIX)]
            arrays = {name: archive[name] for name in archive.files if name not in names}
            others = [archive.zip.getinfo(f"{name}.npy") for name in names]
            stored = sum(
                _row_count(archive, name) for name in [*names, *(["features"] if "features" in arrays else [])]
            )
        protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {"file": file.name}
    except Exception as error:  # a broken archive raises almost any kind
        raise ConfigError(f"{path} cannot be read as a .npz archive ({type(error).__name__}).") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise ConfigError(f"{path} is no reference: it holds no mu and sigma, only {', '.join(arrays) or 'nothing'}.")
    gaussian = Gaussian.from_covariance(arrays["mu"], arrays["sigma"], path)
    features = arrays.get("features")
    if features is not None:
        features = scores.validate_features(features, path, at_least=1, needed_for="a reference")
        scores.check_same_features(features, gaussian.root)
    protocol.setdefault("network", {"dims": len(gaussian.mean)})
    digest = _hash_content(arrays, others)
    return Reference(protocol, digest, gaussian, features, arrays.get("profile"), path, tuple(names), stored)


def _row_count(archive: Any, name: str) -> int:
    """The number of rows of an array in an open .npz file, by its header."""
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return int(read(file)[0][0])


def feature_tiles(reference: Reference) -> Iterator[np.ndarray]:
    """The features (m, d) of all images of a reference that has some, a tile in memory at a time.

    Raises:
      ConfigError: The file is damaged, or has changed since it was loaded.
    """
    assert reference.features is not None
    yield reference.features
    if not reference.others:
        return
    try:
        with epath.Path(reference.path).open("rb") as content, np.load(content, allow_pickle=False) as archive:
            for name in reference.others:
                yield archive[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{reference.path} is damaged or has changed ({type(error).__name__}).") from None


def check_compatible(reference: Reference, path: str, network: Mapping[str, Any], image: Mapping[str, Any]) -> None:
    """Refuses a reference that was made with another network or from images of another preprocessing.

    Raises:
      ConfigError: names what differs.
    """
    for name, wanted in (("network", network), ("image", image)):
        given = reference.protocol.get(name, {})
        for field in wanted:
            if field in given and given[field] != wanted[field]:
                raise ConfigError(
                    f"the reference {path} was made with {name} {field} {given[field]!r}, and here it is "
                    f"{wanted[field]!r}: make one with --mode=reference and this config."
                )


def _hash_content(arrays: Mapping[str, np.ndarray], others: Sequence[zipfile.ZipInfo]) -> str:
    """Hashes the arrays, and the checksums of those that stay in the file."""
    sha = hashlib.sha256()
    for info in others:
        sha.update(f"{info.filename} {info.file_size} {info.CRC:08x}\n".encode())
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()[:16]
