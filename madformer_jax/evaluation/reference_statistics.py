"""The reference file of --mode=reference: statistics of real images and their protocol.

`modes.reference` writes it and `judge` loads it. The file is a .npz archive with these
arrays:

  mu, sigma: Mean (d,) and covariance (d, d) over n - 1 of all features.
  features, labels: Up to `MAX_STORED_FEATURES` feature vectors (m, d) and their classes (m,).
  counts: Number of images of each class.
  profile: Mean of `seams.difference_profiles`.
  protocol: JSON.
  others_000000, ...: The remaining feature vectors. Only the memorization score reads them, one
  array at a time.

The files of ADM (guided-diffusion) have only `mu` and `sigma`; `load` accepts them.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import scores
from madformer_jax.evaluation.scores import Gaussian
from madformer_jax.evaluation.shards import Arrays
from madformer_jax.runtime import storage

MAX_STORED_FEATURES = 50_000  # vectors of the array `features`
_EXTRA_PREFIX = "others_"


class Reference(NamedTuple):
    """Statistics of a set of images."""

    protocol: Mapping[str, Any]  # source, image, network, n; fewer in foreign files
    digest: str  # of the whole content
    gaussian: Gaussian
    features: np.ndarray | None  # (m, d) float32; None if the file holds only statistics
    profile: np.ndarray | None  # (H - 1 + W - 1,)
    path: str = ""
    extra_arrays: tuple[str, ...] = ()  # names of the arrays with the remaining features
    stored: int = 0  # images whose features the file holds

    @property
    def frechet_input(self) -> np.ndarray | Gaussian:
        """The features if all of them are in memory, which is exact; otherwise the Gaussian."""
        complete = self.features is not None and self.protocol.get("n") == len(self.features)
        return self.features if self.features is not None and complete else self.gaussian


def save(path: str, protocol: Mapping[str, Any], batches: Callable[[], Iterator[Arrays]], classes: int) -> str:
    """Writes the statistics of a set of images. Memory holds one batch and the stored features.

    Args:
      protocol: Description of the images and the network, JSON.
      batches: Starts a new pass over the arrays of a batch: features (m, d), labels (m,), the mean profile
        (1, .) of its images, and their number `weight` (1,).
      classes: Number of classes of the source; 0 if it is unlabeled.

    Returns:
      The digest of the content.

    Raises:
      ConfigError: Features are not finite, or there are less than two images.
    """
    total: Any = 0.0
    labels, profiles, weights = [], [], []
    for batch in batches():
        x = scores.validate_features(batch["features"], "reference", minimum=0, purpose="")
        total += x.sum(axis=0, dtype=np.float64)
        labels.append(batch["labels"])
        profiles.append(batch["profile"])
        weights.append(batch["weight"])
    image_classes = np.concatenate(labels)
    n = len(image_classes)
    if n < 2:
        raise ConfigError(f"a reference of {n} images is too small: a covariance needs at least two.")
    mean = total / n
    is_stored = _stored_mask(n)
    digests = []

    def write_content(file: IO[bytes]) -> None:
        scatter, stored, first = np.zeros(mean.shape * 2), [], 0
        with zipfile.ZipFile(file, "w") as archive:
            for i, x in enumerate(_merge_small_batches(batches())):
                centered = x - mean
                scatter += centered.T @ centered
                rows = is_stored[first : first + len(x)]
                stored.append(x[rows])
                first += len(x)
                if not rows.all():
                    _append_array(archive, f"{_EXTRA_PREFIX}{i:06d}", x[~rows].astype(np.float32))
            extra_files = list(archive.infolist())
            arrays = {
                "mu": mean,
                "sigma": scatter / (n - 1),
                "features": np.concatenate(stored).astype(np.float32),
                "labels": image_classes[is_stored],
                "counts": np.bincount(image_classes, minlength=classes) if classes else np.zeros(0, np.int64),
                "profile": np.average(np.concatenate(profiles), axis=0, weights=np.concatenate(weights)),
                "protocol": np.array(json.dumps(dict(protocol) | {"n": n}, sort_keys=True)),
            }
            for name, array in arrays.items():
                _append_array(archive, name, array)
        digests.append(_hash_content(arrays, extra_files))

    storage.write(path, write_content)
    return digests[-1]


def _stored_mask(n: int) -> np.ndarray:
    """Returns which of n images are in the array `features`, (n,) bool."""
    is_stored = np.zeros(n, bool)
    is_stored[np.random.RandomState(2020).permutation(n)[:MAX_STORED_FEATURES]] = True
    return is_stored


def tile_order(n: int) -> np.ndarray:
    """Returns the numbers (n,) of n images in the order of the rows of `feature_tiles`."""
    is_stored = _stored_mask(n)
    return np.concatenate([np.flatnonzero(is_stored), np.flatnonzero(~is_stored)])


def _append_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Appends an array in the format of `np.savez`, which would need all arrays in memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _merge_small_batches(batches: Iterator[Arrays]) -> Iterator[np.ndarray]:
    """Yields features of at least `TILE_ROWS` images at a time.

    A matrix product for each small batch would be slow.
    """
    pending: list[np.ndarray] = []
    for batch in batches:
        pending.append(batch["features"])
        if sum(map(len, pending)) >= scores.TILE_ROWS:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def load(path: str) -> Reference:
    """Loads a reference file.

    Raises:
      ConfigError: The file is missing or damaged, or has no `mu` and `sigma`.
    """
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError(
            f"the reference {path} does not exist: make it with --mode=reference, or set evaluate.reference."
        )
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith(_EXTRA_PREFIX)]
            arrays = {name: archive[name] for name in archive.files if name not in names}
            extra_files = [archive.zip.getinfo(f"{name}.npy") for name in names]
            stored = sum(
                _row_count(archive, name) for name in [*names, *(["features"] if "features" in arrays else [])]
            )
        protocol = dict(json.loads(str(arrays["protocol"]))) if "protocol" in arrays else {"file": file.name}
    except Exception as error:  # A damaged archive raises many types of errors.
        raise ConfigError(f"{path} cannot be read as a .npz archive ({type(error).__name__}).") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise ConfigError(
            f"{path} is not a reference: it holds no mu and sigma, only {', '.join(arrays) or 'nothing'}."
        )
    gaussian = Gaussian.from_covariance(arrays["mu"], arrays["sigma"], path)
    features = arrays.get("features")
    if features is not None:
        features = scores.validate_features(features, path, minimum=1, purpose="a reference")
        scores.check_same_features(features, gaussian.root)
    protocol.setdefault("network", {"dims": len(gaussian.mean)})
    digest = _hash_content(arrays, extra_files)
    return Reference(protocol, digest, gaussian, features, arrays.get("profile"), path, tuple(names), stored)


def _row_count(archive: Any, name: str) -> int:
    """Reads the number of rows of an array from its header in an open .npz archive."""
    with archive.zip.open(f"{name}.npy") as file:
        return preprocess.read_array_header(file)[0][0]


def feature_tiles(reference: Reference) -> Iterator[np.ndarray]:
    """Yields the features (m, d) of all images, one array in memory at a time.

    Raises:
      ConfigError: The file is damaged, or has changed since `load`.
    """
    assert reference.features is not None
    yield reference.features
    if not reference.extra_arrays:
        return
    try:
        with epath.Path(reference.path).open("rb") as content, np.load(content, allow_pickle=False) as archive:
            for name in reference.extra_arrays:
                yield archive[name]
    except Exception as error:  # A damaged archive raises many types of errors.
        raise ConfigError(f"{reference.path} is damaged or has changed ({type(error).__name__}).") from None


def check_compatible(reference: Reference, path: str, network: Mapping[str, Any], image: Mapping[str, Any]) -> None:
    """Checks that a reference was made with the same network and the same preprocessing.

    Args:
      path: Its path, for the error.
      network: Description of the network, see `Network.describe`.
      image: Description of the preprocessing.

    Raises:
      ConfigError: A field of the network or of the preprocessing differs. The message names it.
    """
    for name, expected in (("network", network), ("image", image)):
        actual = reference.protocol.get(name, {})
        for field in expected:
            if field in actual and actual[field] != expected[field]:
                raise ConfigError(
                    f"the reference {path} was made with {name} {field} {actual[field]!r}, and here it is "
                    f"{expected[field]!r}: make one with --mode=reference and this config."
                )


def _hash_content(arrays: Mapping[str, np.ndarray], extra_files: Sequence[zipfile.ZipInfo]) -> str:
    """Hashes the arrays in memory and the checksums of the arrays that stay in the file."""
    sha = hashlib.sha256()
    for info in extra_files:
        sha.update(f"{info.filename} {info.file_size} {info.CRC:08x}\n".encode())
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()[:16]
