"""The source `drawings`: pictures that the package dicebear draws, as many as wanted and at any size.

Picture i is a function of (seed, i) alone, and the same at every size: of style i mod 5 (the class), with what dicebear draws
for the seed "seed/i". Below 64 x 64 it is drawn larger and averaged, which keeps thin lines where they are.

A picture costs 4 ms at 64 x 64 and 22 ms at 256 x 256, so they are drawn once, by as many processes as there are
cores, into the user's cache. A file there holds a hundred of each style as PNG, and their attributes; it appears whole or not
at all, so that what a killed drawing made is kept, and several runs may share it. Drawing processes run this file and import
no JAX.
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
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from madformer_jax.data.drawings import attributes, captions
from madformer_jax.data.source import Examples, Source, Subset, fingerprint, hash_fraction, test_mask
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

STYLES = tuple(attributes.STYLES)
SPLITS = ("train", "test", "composition", "all")
MIN_SIZE = 16  # pixels: below, nobody sees what is drawn
_MIN_RENDER_SIZE = 64  # pixels: smaller pictures are drawn at a multiple of their size
_PICTURES_PER_FILE = 500  # pictures a file: what is drawn again after a kill, at most, by each process
_CACHE_ERROR = "config.data.source=drawings cannot keep its pictures in {}"
_PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")

# Of these two attributes of a style, training sees nine in ten of the combinations.
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
    words: dict[str, str]  # its attributes, without those that are "none"


def draw(seed: int, number: int, size: int) -> Drawing:
    """Picture `number`, of size x size pixels.

    Raises:
      ConfigError: the packages are of a version that draws other things.
    """
    from dicebear import Avatar

    name = STYLES[number % len(STYLES)]
    avatar = Avatar(_load_style(name), {"seed": f"{seed}/{number}"}).to_json()
    try:
        words = attributes.from_options(name, avatar["options"])
    except KeyError as error:
        raise ConfigError(
            f"config.data.source=drawings: {', '.join(map(' '.join, _package_versions().items()))} draw {error} in {name}, which has "
            "no name here: install the versions of requirements.txt."
        ) from None
    return Drawing(_render_png(avatar["svg"], size), words)


@functools.cache
def _load_style(name: str) -> Any:
    from dicebear import Style
    from dicebear.validator import StyleValidator

    definition = (importlib.resources.files("dicebear_styles") / f"{name}.json").read_text("utf-8")
    checker: Any = StyleValidator
    check, checker.validate = checker.validate, lambda data: None  # what comes with a package; it takes 3 s a process
    try:
        return Style(json.loads(definition))
    finally:
        checker.validate = check


def _render_png(svg: str, size: int) -> bytes:
    import resvg_py

    times = math.ceil(_MIN_RENDER_SIZE / size)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size * times, height=size * times, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        opaque = image.convert("RGB")  # every style has a background
    out = io.BytesIO()
    opaque.reduce(times).save(out, "PNG")
    return out.getvalue()


# ---- the cache


class _CacheFile(NamedTuple):
    """What a file of the cache holds: `_FILE` pictures."""

    png: np.ndarray  # uint8, the PNGs one after the other
    ends: np.ndarray  # int64 (n,), where each ends
    attributes: np.ndarray  # int32 (n, A)


@functools.cache
def _package_versions() -> dict[str, str]:
    """Of the packages.

    Raises:
      ConfigError: one is not there.
    """
    try:
        return {name: importlib.metadata.version(name) for name in _PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"config.data.source=drawings needs a package: pip install {error.name}.") from None


def cache_key(seed: int) -> str:
    """Hash of all that decides the pictures and their attributes, but for their size."""
    content = [seed, attributes.TABLE_HASH, _MIN_RENDER_SIZE, _package_versions()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _path(folder: str, first: int) -> str:
    return os.path.join(folder, f"{first:08}.npz")


def _write(folder: str, numbers: range, seed: int, size: int) -> None:
    drawn = [draw(seed, number, size) for number in numbers]
    content = _CacheFile(
        np.frombuffer(b"".join(one.png for one in drawn), np.uint8),
        np.cumsum([len(one.png) for one in drawn]),
        np.stack([attributes.to_indices(one.words) for one in drawn]),
    )
    storage.write(_path(folder, numbers.start), lambda file: np.savez(file, **content._asdict()))


def _read(folder: str, first: int) -> _CacheFile | None:
    """A file of the cache; None where there is none, or a damaged one: zip keeps checksums."""
    path = _path(folder, first)
    try:
        with np.load(path) as content:
            return _CacheFile(*(content[name] for name in _CacheFile._fields))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logging.warning("%s is damaged (%s), and is drawn again", path, first_line(error))
        return None


@functools.cache  # of each process
def _load_pictures(seed: int, size: int, count: int) -> list[_CacheFile]:
    """Pictures 0 to `count` - 1, and more to fill the last file; those that are not there are drawn."""
    folder = os.path.join(storage.user_cache("drawings"), f"{cache_key(seed)[:16]}-{size}")
    with storage.wrap_errors(_CACHE_ERROR.format(folder)):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be drawing them
            found = {first: _read(folder, first) for first in range(0, count, _PICTURES_PER_FILE)}
            missing = [first for first, file in found.items() if file is None]
            about: dict[str, Any] = {"desc": f"drawing {size} x {size}", "unit": "picture", "disable": not missing}
            with tqdm(total=_PICTURES_PER_FILE * len(missing), **about) as bar:
                for first in _draw_files(folder, missing, seed, size):
                    found[first] = _read(folder, first)
                    bar.update(_PICTURES_PER_FILE)
    whole = [file for file in found.values() if file is not None]
    if len(whole) < len(found):
        raise ConfigError(f"{_CACHE_ERROR.format(folder)}: what was written is not what is read. Is the disk sound?")
    return whole


def _draw_files(folder: str, missing: list[int], seed: int, size: int) -> Iterator[int]:
    """Draws files, in processes if there are several, and yields the first number of each that is there."""
    processes = min(len(missing), os.cpu_count() or 1)
    if processes < 2:
        for first in missing:
            _write(folder, range(first, first + _PICTURES_PER_FILE), seed, size)
            yield first
        return
    output, theirs = os.pipe()
    command = [sys.executable, "-m", __name__, folder, str(seed), str(size), str(_PICTURES_PER_FILE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    drawing = [
        subprocess.Popen([*command, *map(str, missing[i::processes])], stdout=theirs, env=environment)
        for i in range(processes)
    ]
    os.close(theirs)
    try:
        with open(output) as lines:
            for line in map(str.strip, lines):
                if not line.isdecimal():
                    raise ConfigError(line)
                yield int(line)
        for process in drawing:
            if process.wait():
                raise ConfigError(f"config.data.source=drawings: a drawing process ended ({process.returncode}).")
    finally:
        for process in drawing:
            process.terminate()
            process.wait()


def _run_drawing_process(folder: str, seed: int, size: int, count: int, *first: int) -> None:
    """Draws files and says which are there, or in a line what went wrong; ends with the process that reads it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    try:
        for number in first:
            with storage.wrap_errors(_CACHE_ERROR.format(folder)):
                _write(folder, range(number, number + count), seed, size)
            print(f"{number}\n", end="", flush=True)  # in one write: others have the same pipe, which may be unbuffered
    except ConfigError as error:
        print(error, flush=True)
    except BrokenPipeError:
        os._exit(1)


# ---- the source


class Drawings(Source):
    """The pictures 0 to count - 1."""

    classes = len(STYLES)
    names = STYLES
    attributes = attributes.ATTRIBUTES

    def __init__(self, count: int, size: int, seed: int = 0):
        """Draws what is not in the cache yet.

        Raises:
          ConfigError: the packages are missing, pictures of that size would show nothing, or the cache cannot be written.
        """
        if size < MIN_SIZE:
            raise ConfigError(f"config.data.image_size={size} is too small for drawings: at least {MIN_SIZE}.")
        self._count, self._size, self._seed = count, size, seed
        self.fingerprint = fingerprint([cache_key(seed), str(count)])
        self._files()

    def _files(self) -> list[_CacheFile]:
        return _load_pictures(self._seed, self._size, self._count)  # not ours, so that workers get no copies

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray) -> Examples:
        files = self._files()
        images, rows = [], []
        for number in indices.tolist():
            file, i = files[number // _PICTURES_PER_FILE], number % _PICTURES_PER_FILE
            images.append(file.png[file.ends[i - 1] if i else 0 : file.ends[i]].tobytes())
            rows.append(file.attributes[i])
        labels = (indices % len(STYLES)).astype(np.int32)
        table = np.array(rows, np.int32).reshape(len(rows), len(self.attributes))
        return Examples({"image": images}, labels, list(map(_caption, indices.tolist(), rows)), table)

    def captions(self, indices: np.ndarray) -> list[str]:
        files = self._files()
        return [
            _caption(number, files[number // _PICTURES_PER_FILE].attributes[number % _PICTURES_PER_FILE])
            for number in indices.tolist()
        ]

    def name(self, index: int) -> str:
        return f"drawing {self._seed}/{index}"

    def parts(self, test_share: float) -> np.ndarray:
        """The split of each picture, (count,) of indices into `SPLITS`.

        A combination of the two attributes in `PAIRS` is held out by its own hash, and every picture of it with it; of the
        others a picture is held out by the hash of its name.
        """
        rows = np.concatenate([file.attributes for file in self._files()])[: self._count]
        found = test_mask(
            np.fromiter(map(hash_fraction, map(self.name, range(self._count))), np.uint64, self._count), test_share
        )
        composed = [is_composition(STYLES[i % len(STYLES)], attributes.from_indices(row)) for i, row in enumerate(rows)]
        return np.where(composed, SPLITS.index("composition"), np.where(found, SPLITS.index("test"), 0))


def _caption(number: int, row: np.ndarray) -> str:
    style, phrasing = number % len(STYLES), number // len(STYLES)
    return captions.caption(STYLES[style], attributes.from_indices(row), phrasing)


def captioned_attributes(rows: np.ndarray) -> np.ndarray:
    """Of attributes (n, A) those that the captions name; the others are 0."""
    found = rows.copy()
    names = [name for name, _ in attributes.ATTRIBUTES]
    for row in found:
        row[[names.index(name) for name in captions.unmentioned(attributes.from_indices(row))]] = 0
    return found


def is_composition(style: str, words: dict[str, str]) -> bool:
    """Whether a drawing shows a combination that training never sees. A thing that is not there combines with nothing."""
    pair = [words.get(name) for name in COMPOSITION_PAIRS[style]]
    return None not in pair and hash_fraction(f"{style}: {', '.join(map(str, pair))}") < COMPOSITION_SHARE * 2.0**64


def open_split(split: str, count: int, size: int, test_share: float) -> Source:
    """The pictures of a split.

    Raises:
      ConfigError: no such split, or it is empty; and as `Drawings`.
    """
    if split not in SPLITS:
        raise ConfigError(f"config.data.split={split!r} is unknown: drawings have {', '.join(SPLITS)}.")
    whole = Drawings(count, size)
    if split == "all":
        return whole
    numbers = np.flatnonzero(whole.parts(test_share) == SPLITS.index(split))
    if not len(numbers):
        raise ConfigError(
            f"config.data.split={split!r} is empty: config.data.test_share={test_share} of config.data.drawings={count}."
        )
    return Subset(whole, numbers)


if __name__ == "__main__":
    _run_drawing_process(sys.argv[1], *map(int, sys.argv[2:]))
