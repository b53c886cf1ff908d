"""Lists a folder: the files that a person put there, and one log line about those that are left out.

Images and tars are found here, for every source and for `evaluate.images`. Hidden names and the folders that systems make
are left out. Linked folders are followed, each real folder once, so that loops end.
"""

import collections
import functools
import os
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from absl import logging

# What Pillow decodes, by the suffixes in use. The list is fixed: the images of a folder do not depend on Pillow's version.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm",
    ".pgm", ".pbm",
)  # fmt: skip
_SYSTEM_FOLDERS = {
    "__macosx",
    "@eadir",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
_MAX_EXAMPLES = 2
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # would break a line or its encoding


class Exclusions:
    """Counts what a listing leaves out."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, path: str) -> None:
        self._counts[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(path)

    def add_file(self, path: str) -> None:
        """Adds a file under its suffix."""
        self.add(suffix(path) or "no suffix", path)

    def line(self) -> str:
        """Describes everything, as in ".heic: 3 (a.heic, b.heic, ...), links that lead nowhere: 1 (9.png)"."""
        return printable(
            ", ".join(
                f"{kind}: {count} ({', '.join(self._examples[kind])}{', ...' if count > _MAX_EXAMPLES else ''})"
                for kind, count in self._counts.most_common()
            )
        )

    def log(self, path: str) -> None:
        """Logs the line once a process, if there is anything to say."""
        if self._counts:
            warn_once(f"{printable(path)}: left out: {self.line()}")


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, but not the same one again: a run opens its source several times."""
    logging.warning("%s", message)


class FolderEntries(NamedTuple):
    """What one folder holds: sorted paths."""

    folders: list[str]
    linked: list[str]  # links to folders, except to one that the link lies in
    files: list[str]


def scan(folder: str, left_out: Exclusions) -> FolderEntries:
    """Lists one folder.

    Raises:
      OSError: It cannot be listed.
    """
    level = FolderEntries([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                if not entry.is_symlink() and entry.is_dir():
                    left_out.add("hidden or system folders", entry.path)
            elif entry.is_symlink():
                if os.path.isfile(entry.path):
                    level.files.append(entry.path)
                elif not os.path.isdir(entry.path):
                    left_out.add("links that lead nowhere", entry.path)
                elif _is_within(os.path.realpath(entry.path), os.path.realpath(folder)):
                    left_out.add("links to a folder around them", entry.path)
                else:
                    level.linked.append(entry.path)
            elif entry.is_dir():
                level.folders.append(entry.path)
            elif entry.is_file():
                level.files.append(entry.path)
            else:
                left_out.add("pipes, sockets or devices", entry.path)
    return level


def list_files(path: str, left_out: Exclusions) -> list[str]:
    """Lists all files below a folder, sorted. Files that are reached both directly and by a link keep their direct path.

    Raises:
      OSError: A folder cannot be listed.
    """
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    links = collections.deque([path])
    while links:
        folders = [links.popleft()]
        while folders:
            folder = folders.pop()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                left_out.add("links to a folder that is read already", folder)
                continue
            seen.add((status.st_dev, status.st_ino))
            level = scan(folder, left_out)
            files += level.files
            folders += reversed(level.folders)
            links += level.linked
    return sorted(files)


def filter_by_suffix(
    files: Iterable[str], suffixes: Collection[str], silent: Collection[str], left_out: Exclusions
) -> list[str]:
    """Keeps the files with one of `suffixes`. The others are counted, except those with one of `silent`."""
    kept = []
    for file in files:
        if suffix(file) in suffixes:
            kept.append(file)
        elif suffix(file) not in silent:
            left_out.add_file(file)
    return kept


def is_hidden(name: str) -> bool:
    """Whether a name is hidden (`.thumbnails`, `._0.png`) or that of a folder that a system makes (`__MACOSX`)."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def suffix(path: str) -> str:
    """The part of a file's name from its last dot on, in lower case."""
    return os.path.splitext(path)[1].lower()


def printable(name: str) -> str:
    """A name for one line of text: line breaks, control characters and bytes that are not UTF-8 are escaped."""
    return _UNPRINTABLE.sub(lambda match: _escaped(match[0]), name)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # what Python makes of a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


def _is_within(folder: str, other: str) -> bool:
    """Whether a real path is another's, or that of a folder around it."""
    return other == folder or other.startswith(folder.rstrip(os.sep) + os.sep)
