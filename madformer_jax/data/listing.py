"""Listing of folders: the files that a user stored there, and one log line about the others.

Sources and `evaluate.images` find their images and tars here. Hidden names and system folders are
left out; add further ones to `_SYSTEM_FOLDERS`. Links to folders are followed. Each real folder is
read once, so that loops end.
"""

import collections
import functools
import os
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from absl import logging

# Suffixes of the formats that Pillow decodes. The list is fixed, so that the images of a folder do
# not depend on Pillow's version.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm",
    ".pgm", ".pbm",
)  # fmt: skip
_SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
_MAX_EXAMPLES = 2
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # would break a line or its encoding


class Exclusions:
    """Counts of the entries that a listing leaves out, by kind, with a few examples."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, path: str) -> None:
        self._counts[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(path)

    def add_file(self, path: str) -> None:
        """Counts a file under its suffix."""
        self.add(suffix(path) or "no suffix", path)

    def summary(self) -> str:
        """Returns the counts and examples of all kinds in one line.

        Example: ".heic: 3 (a.heic, b.heic, ...), links that lead nowhere: 1 (9.png)".
        """
        return printable(
            ", ".join(
                f"{kind}: {count} ({', '.join(self._examples[kind])}{', ...' if count > _MAX_EXAMPLES else ''})"
                for kind, count in self._counts.most_common()
            )
        )

    def log(self, path: str) -> None:
        """Logs the summary once per process, unless it is empty."""
        if self._counts:
            warn_once(f"{printable(path)}: left out: {self.summary()}")


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning unless this process logged it before: a run opens its source several times."""
    logging.warning("%s", message)


class FolderEntries(NamedTuple):
    """Entries of one folder as sorted paths."""

    folders: list[str]
    linked: list[str]  # links to folders; a link to one of its own parent folders is left out
    files: list[str]


def scan(folder: str, exclusions: Exclusions) -> FolderEntries:
    """Lists one folder.

    Raises:
      OSError: The folder cannot be listed.
    """
    level = FolderEntries([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                if not entry.is_symlink() and entry.is_dir():
                    exclusions.add("hidden or system folders", entry.path)
            elif entry.is_symlink():
                if os.path.isfile(entry.path):
                    level.files.append(entry.path)
                elif not os.path.isdir(entry.path):
                    exclusions.add("links that lead nowhere", entry.path)
                elif (target := os.path.realpath(entry.path)) == os.path.commonpath([target, os.path.realpath(folder)]):
                    exclusions.add("links to a folder around them", entry.path)
                else:
                    level.linked.append(entry.path)
            elif entry.is_dir():
                level.folders.append(entry.path)
            elif entry.is_file():
                level.files.append(entry.path)
            else:
                exclusions.add("pipes, sockets or devices", entry.path)
    return level


def list_files(path: str, exclusions: Exclusions) -> list[str]:
    """Lists all files below a folder, sorted.

    Files of a folder that is reached both directly and by a link to the folder are listed once,
    with the direct path. A link to a file is listed beside the file.

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
                exclusions.add("links to a folder that is read already", folder)
                continue
            seen.add((status.st_dev, status.st_ino))
            level = scan(folder, exclusions)
            files += level.files
            folders += reversed(level.folders)
            links += level.linked
    return sorted(files)


def filter_by_suffix(
    files: Iterable[str], suffixes: Collection[str], silent: Collection[str], exclusions: Exclusions
) -> list[str]:
    """Returns the files with one of `suffixes`.

    The others are added to `exclusions`, except those with one of the suffixes `silent`.
    """
    matching = []
    for file in files:
        if suffix(file) in suffixes:
            matching.append(file)
        elif suffix(file) not in silent:
            exclusions.add_file(file)
    return matching


def is_hidden(name: str) -> bool:
    """Returns whether a name is hidden or belongs to the operating system.

    Examples: `.thumbnails` and `._0.png`; `__MACOSX`.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def suffix(path: str) -> str:
    """Returns the suffix of a path with its dot, in lower case."""
    return os.path.splitext(path)[1].lower()


def printable(name: str) -> str:
    """Escapes line breaks, control characters and bytes that are not UTF-8."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), name)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # surrogateescape: a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()
