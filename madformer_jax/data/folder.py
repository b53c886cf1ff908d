"""Source `folder`: image files of a folder, with subfolders as classes.

`evaluation/images.py` also opens folders of images with it. `listing` decides which files and
subfolders count, `sidecars` reads the captions.
"""

import os
from collections.abc import Sequence

import numpy as np

from madformer_jax.data import listing, sidecars
from madformer_jax.data.source import Examples, Source
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage


class Folder(Source):
    """The images of a folder.

    Classes are numbered in the order of their names. Empty subfolders count, so that a class keeps
    its number while its images are elsewhere.
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

    def _filter(self, files: list[str], exclusions: listing.Exclusions) -> list[str]:
        return listing.filter_by_suffix(files, self.suffixes, sidecars.CAPTION_SUFFIXES, exclusions)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray) -> Examples:
        images = []
        for index in indices.tolist():
            with open(self._files[index], "rb") as file:
                images.append(file.read())
        return Examples({"image": images}, self.labels(indices), self.captions(indices))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._labels[indices]

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

    def key(self, index: int) -> str:
        return self._keys[index]


def _check_class_names(setting: str, names: Sequence[str]) -> None:
    for name in names:
        if (shown := listing.printable(name)) != name:
            raise ConfigError(
                f"{setting}: the class '{shown}' has a line break, a control character or a byte that is not UTF-8 in its name: "
                "rename the subfolder."
            )
