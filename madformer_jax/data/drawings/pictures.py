"""Source `drawings`: any number of pictures of any size, drawn by the package dicebear.

The names of what is visible are in `attributes`, the sentences in `captions`.

Picture i depends on (seed, i) alone and shows the same at every size. Its style, which is its
class, is i mod 5. The rest is what dicebear draws for the seed "seed/i". Below 64 x 64 it is drawn
larger and averaged, which keeps thin lines at their positions.

A picture takes 4 ms at 64 x 64 and 22 ms at 256 x 256. Pictures are therefore drawn once into the
user's cache, by one process per core. A cache file holds 100 pictures of each style as PNG and
their attributes. It is written atomically, so that several runs can share the cache, and a killed
run loses at most one file per process. Drawing processes run this module and must not import JAX.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from madformer_jax.data.drawings import attributes, captions
from madformer_jax.data.source import Examples, Source, fingerprint, hash_fraction
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

STYLES = tuple(attributes.STYLES)
MIN_SIZE = 16  # pixels; smaller pictures are not recognizable
_MIN_RENDER_SIZE = 64  # pixels; smaller pictures are drawn at a multiple of their size
_PICTURES_PER_FILE = 500
_CACHE_ERROR = "config.data.source=drawings cannot store its pictures in {}"
_PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")

# Pairs of attributes by style. Training sees only 90 % of the combinations of the two.
COMPOSITION_PAIRS = {
    "clay": ("colour", "body"),
    "critters": ("colour", "body"),
    "planets": ("colour", "pattern"),
    "landscape": ("background", "near hills"),
    "voxel-art": ("colour", "outfit"),
}
COMPOSITION_SHARE = 0.1


# ---- a picture


class Drawing(NamedTuple):
    """One picture."""

    png: bytes
    words: dict[str, str]  # attributes, without those that are "none"


def draw(seed: int, number: int, size: int) -> Drawing:
    """Draws picture `number` with size x size pixels.

    Raises:
      ConfigError: The installed packages draw a variant that `attributes` does not know.
    """
    from dicebear import Avatar

    name = STYLES[number % len(STYLES)]
    avatar = Avatar(_load_style(name), {"seed": f"{seed}/{number}"}).to_json()
    try:
        words = attributes.from_options(name, avatar["options"])
    except KeyError as error:
        raise ConfigError(
            f"config.data.source=drawings: {', '.join(map(' '.join, _package_versions().items()))} draw {error} in {name}, "
            "which is unknown: install the versions of requirements.txt."
        ) from None
    return Drawing(_render_png(avatar["svg"], size), words)


@functools.cache
def _load_style(name: str) -> Any:
    from dicebear import Style
    from dicebear.validator import StyleValidator

    definition = (importlib.resources.files("dicebear_styles") / f"{name}.json").read_text("utf-8")
    validator: Any = StyleValidator
    # Validation takes 3 s per process, and the definitions of the package are valid.
    validate, validator.validate = validator.validate, lambda data: None
    try:
        return Style(json.loads(definition))
    finally:
        validator.validate = validate


def _render_png(svg: str, size: int) -> bytes:
    import resvg_py

    scale = math.ceil(_MIN_RENDER_SIZE / size)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size * scale, height=size * scale, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        opaque = image.convert("RGB")  # every style has a background
    out = io.BytesIO()
    opaque.reduce(scale).save(out, "PNG")
    return out.getvalue()


# ---- the cache


class _CacheFile(NamedTuple):
    """Content of a cache file (npz) of n = `_PICTURES_PER_FILE` pictures."""

    png: np.ndarray  # uint8, the PNG files one after the other
    ends: np.ndarray  # int64 (n,), end of each PNG file
    attributes: np.ndarray  # int32 (n, A)


@functools.cache
def _package_versions() -> dict[str, str]:
    """Returns the versions of the packages that decide the pictures."""
    try:
        return {name: importlib.metadata.version(name) for name in _PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"config.data.source=drawings needs a package: pip install {error.name}.") from None


def cache_key(seed: int) -> str:
    """Hashes everything that decides the pictures and their attributes, except their size."""
    content = [seed, attributes.TABLE_HASH, _MIN_RENDER_SIZE, _package_versions()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _path(folder: str, first: int) -> str:
    return os.path.join(folder, f"{first:08}.npz")


def _write(folder: str, numbers: range, seed: int, size: int) -> None:
    drawings = [draw(seed, number, size) for number in numbers]
    content = _CacheFile(
        np.frombuffer(b"".join(drawing.png for drawing in drawings), np.uint8),
        np.cumsum([len(drawing.png) for drawing in drawings]),
        np.stack([attributes.to_indices(drawing.words) for drawing in drawings]),
    )
    storage.write(_path(folder, numbers.start), lambda file: np.savez(file, **content._asdict()))


def _read(folder: str, first: int) -> _CacheFile | None:
    """Reads a cache file; returns None if it does not exist or a checksum (zip) does not match."""
    path = _path(folder, first)
    try:
        with np.load(path) as content:
            return _CacheFile(*(content[name] for name in _CacheFile._fields))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive raises many types of errors
        logging.warning("%s is damaged (%s) and is drawn again", path, first_line(error))
        return None


@functools.cache
def _load_pictures(seed: int, size: int, count: int) -> list[_CacheFile]:
    """Loads the pictures 0 to `count` - 1 and those that fill the last file.

    Pictures that are not in the cache are drawn.
    """
    folder = os.path.join(storage.user_cache("drawings"), f"{cache_key(seed)[:16]}-{size}")
    with storage.wrap_errors(_CACHE_ERROR.format(folder)):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be drawing them
            files = {first: _read(folder, first) for first in range(0, count, _PICTURES_PER_FILE)}
            missing = [first for first, file in files.items() if file is None]
            options: dict[str, Any] = {"desc": f"drawing {size} x {size}", "unit": "picture", "disable": not missing}
            with tqdm(total=_PICTURES_PER_FILE * len(missing), **options) as bar:
                for first in _draw_files(folder, missing, seed, size):
                    files[first] = _read(folder, first)
                    bar.update(_PICTURES_PER_FILE)
    readable = [file for file in files.values() if file is not None]
    if len(readable) < len(files):
        raise ConfigError(f"{_CACHE_ERROR.format(folder)}: files are damaged right after writing. Check the disk.")
    return readable


def _draw_files(folder: str, missing: list[int], seed: int, size: int) -> Iterator[int]:
    """Draws files, in several processes if possible, and yields the first number of each."""
    processes = min(len(missing), os.cpu_count() or 1)
    if processes < 2:
        for first in missing:
            _write(folder, range(first, first + _PICTURES_PER_FILE), seed, size)
            yield first
        return
    output, child_output = os.pipe()
    command = [sys.executable, "-m", __name__, folder, str(seed), str(size), str(_PICTURES_PER_FILE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    children = [
        subprocess.Popen([*command, *map(str, missing[i::processes])], stdout=child_output, env=environment)
        for i in range(processes)
    ]
    os.close(child_output)
    try:
        with open(output) as lines:
            for line in map(str.strip, lines):
                if not line.isdecimal():
                    raise ConfigError(line)
                yield int(line)
        for child in children:
            if child.wait():
                raise ConfigError(
                    f"config.data.source=drawings: a drawing process failed (status {child.returncode}). Run it again."
                )
    finally:
        for child in children:
            child.terminate()
            child.wait()


def _run_drawing_process(folder: str, seed: int, size: int, count: int, *first: int) -> None:
    """Draws files and prints the first number of each, or an error in one line.

    The process exits when its parent, which reads the lines, is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    try:
        for number in first:
            with storage.wrap_errors(_CACHE_ERROR.format(folder)):
                _write(folder, range(number, number + count), seed, size)
            print(f"{number}\n", end="", flush=True)  # a single write, because processes share the pipe
    except ConfigError as error:
        print(error, flush=True)
    except BrokenPipeError:
        os._exit(1)


# ---- the source


class Drawings(Source):
    """The pictures 0 to count - 1, of all splits."""

    splits = ("train", "test", "composition")
    names = STYLES
    attributes = attributes.ATTRIBUTES

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Drawings":
        return cls(data.drawings, data.image_size)

    @classmethod
    def enlarge(cls, data: ConfigDict, factor: int) -> None:
        data.drawings *= factor

    def __init__(self, count: int, size: int, seed: int = 0):
        """Draws the pictures of size x size pixels that are not in the cache.

        Raises:
          ConfigError: A package is not installed, `size` is too small, or the cache cannot be written.
        """
        if size < MIN_SIZE:
            raise ConfigError(f"config.data.image_size={size} is too small for drawings: at least {MIN_SIZE}.")
        self._count, self._size, self._seed = count, size, seed
        self.fingerprint = fingerprint([cache_key(seed), str(count)])
        self._files()

    def _files(self) -> list[_CacheFile]:
        return _load_pictures(self._seed, self._size, self._count)  # not an attribute, which workers would copy

    def __len__(self) -> int:
        return self._count

    def _attributes(self, indices: np.ndarray) -> np.ndarray:
        files = self._files()
        rows = [files[i // _PICTURES_PER_FILE].attributes[i % _PICTURES_PER_FILE] for i in indices.tolist()]
        return np.array(rows, np.int32).reshape(len(rows), len(self.attributes))

    def read(self, indices: np.ndarray) -> Examples:
        files = self._files()
        images = []
        for number in indices.tolist():
            file, i = files[number // _PICTURES_PER_FILE], number % _PICTURES_PER_FILE
            images.append(file.png[file.ends[i - 1] if i else 0 : file.ends[i]].tobytes())
        labels = (indices % len(STYLES)).astype(np.int32)
        return Examples({"image": images}, labels, self.captions(indices), self._attributes(indices))

    def captions(self, indices: np.ndarray) -> list[str]:
        return list(map(_caption, indices.tolist(), self._attributes(indices)))

    def captioned_attributes(self, indices: np.ndarray) -> np.ndarray:
        return captioned_attributes(self._attributes(indices))

    def name(self, index: int) -> str:
        return f"drawing {self._seed}/{index}"

    def split_indices(self, test_share: float) -> np.ndarray:
        """Returns the split of each picture as an index into `splits`, int (count,).

        The hash of a combination of the attributes in `COMPOSITION_PAIRS` decides whether all its
        pictures belong to the split "composition". Other pictures are assigned by the hash of their
        name.
        """
        in_test = super().split_indices(test_share)
        rows = self._attributes(np.arange(len(self)))
        composed = [is_composition(STYLES[i % len(STYLES)], attributes.from_indices(row)) for i, row in enumerate(rows)]
        return np.where(composed, self.splits.index("composition"), in_test)


def _caption(number: int, row: np.ndarray) -> str:
    style, phrasing = number % len(STYLES), number // len(STYLES)
    return captions.caption(STYLES[style], attributes.from_indices(row), phrasing)


def captioned_attributes(rows: np.ndarray) -> np.ndarray:
    """Returns a copy of attributes (n, A) in which those that the captions omit are 0."""
    mentioned = rows.copy()
    names = [name for name, _ in attributes.ATTRIBUTES]
    for row in mentioned:
        row[[names.index(name) for name in captions.unmentioned(attributes.from_indices(row))]] = 0
    return mentioned


def is_composition(style: str, words: dict[str, str]) -> bool:
    """Returns whether a drawing shows a combination of attributes that training never sees.

    A drawing that lacks one of the two attributes of its style shows no combination.
    """
    pair = [words.get(name) for name in COMPOSITION_PAIRS[style]]
    return None not in pair and hash_fraction(f"{style}: {', '.join(map(str, pair))}") < COMPOSITION_SHARE * 2.0**64


if __name__ == "__main__":
    _run_drawing_process(sys.argv[1], *map(int, sys.argv[2:]))
