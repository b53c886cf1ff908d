"""Source `tfds:<name>`: TensorFlow datasets that are prepared as array_record."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.data.source import Examples, Source, fingerprint
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

_CAPTION_FIELDS = ("caption", "text", "title")  # text features that are read as the caption; the first one wins


class Tfds(Source):
    """A split of a prepared TensorFlow dataset, whose images stay encoded."""

    splits = ()
    takes_name = True

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Tfds":
        if not name:
            raise ConfigError("config.data.source=tfds: names no data set: give tfds:<name>.")
        return cls(name, data.split, data.path)

    def __init__(self, name: str, split: str, data_dir: str):
        """Opens the dataset without downloading anything.

        Raises:
          ConfigError: tfds is not installed, the dataset is unknown or has no image feature, it is
            not prepared in `data_dir`, or it is not stored as array_record.
        """
        try:
            import tensorflow_datasets as tfds
        except ModuleNotFoundError:
            raise ConfigError(f"config.data.source=tfds:{name} needs: pip install tensorflow-datasets.") from None
        where = data_dir or "the default data_dir"
        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
            features = dict(builder.info.features.items())  # FeaturesDict has no `get`
            image = next((key for key, value in features.items() if isinstance(value, tfds.features.Image)), None)
            if image is None:
                raise ConfigError(f"config.data.source=tfds:{name} has no image feature; it has {', '.join(features)}.")
            splits = [*builder.info.splits, "all"]
            # Other splits are expressions such as train[:10%], which tfds checks.
            if split.isidentifier() and split not in splits and splits != ["all"]:
                raise ConfigError(f"config.data.source=tfds:{name} has no split {split!r}, only {', '.join(splits)}.")
            self._rows: Sequence[Any] = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
            first = self._rows[0] if len(self._rows) else {}
        except ConfigError:
            raise
        except Exception as error:  # tfds raises many types, with messages of many lines
            raise ConfigError(
                f"config.data.source=tfds:{name}, split {split!r}, does not open from {where}: {first_line(error).rstrip('.')}. "
                f"Prepare it "
                f"once with tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare(). "
                "This needs TensorFlow: pip install -e '.[cloud]'."
            ) from None
        self._caption = next(
            (key for key in _CAPTION_FIELDS if isinstance(features.get(key), tfds.features.Text)), None
        )
        label = features.get("label")
        is_labeled = isinstance(label, tfds.features.ClassLabel) and first.get("label", -1) >= 0  # -1: not published
        self.names = tuple(features["label"].names) if is_labeled else ()
        self.fingerprint = fingerprint([builder.info.full_name, split, str(len(self._rows))])
        self._image, self._name, self._split = image, name, split

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray) -> Examples:
        rows = [self._rows[index] for index in indices.tolist()]
        labels = np.array([row["label"] if self.classes else 0 for row in rows], np.int32)
        names = map(self.name, indices.tolist())
        captions = [
            storage.decode_text(row[self._caption], name) if self._caption else "" for row, name in zip(rows, names)
        ]
        return Examples({"image": [row[self._image] for row in rows]}, labels, captions)

    def name(self, index: int) -> str:
        return f"tfds:{self._name} {self._split}[{index}]"
