"""What a data source is: random access to images and labels, the same interface whatever holds them."""

from typing import NamedTuple, Protocol

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Example(NamedTuple):
    """One record of a source."""

    image: bytes | np.ndarray  # encoded file, or uint8 (H, W, 1 or 3)
    label: int
    caption: str = ""


class Source(Protocol):
    """Random access to examples. Picklable (each worker process gets a copy) and safe to read from several threads."""

    classes: int  # labels run from 0 to classes - 1; 0: unlabelled, every label is 0

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """What a person calls this record: its file."""
