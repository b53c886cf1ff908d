"""The data sources by name, and `open_source`, which opens the source of a config.

`pipeline`, `evaluation/images.py`, `sampling/prompts.py` and `modes/prepare.py` call it. A new source
is a class in a module of its own and a line in `config.choices.SOURCES`.
"""

import pkgutil

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config import choices
from madformer_jax.data.source import Source, Subset
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

SOURCES: dict[str, type[Source]] = {
    name: pkgutil.resolve_name(f"{__package__}.{path}") for name, path in choices.SOURCES.items()
}


def source_class(config: ConfigDict) -> type[Source]:
    """Returns the class of `data.source`, whose fields state facts that require no data.

    Raises:
      ConfigError: The source is unknown.
    """
    kind, colon, _ = config.data.source.partition(":")
    if kind not in SOURCES or (colon and not SOURCES[kind].takes_name):
        known = ", ".join(f"{name}{':<name>' if source.takes_name else ''}" for name, source in SOURCES.items())
        raise ConfigError(f"config.data.source={config.data.source!r} is unknown: one of {known} (docs/data.md).")
    return SOURCES[kind]


def open_source(config: ConfigDict, split: str | None = None) -> Source:
    """Opens a split of the source that `config.data` names; None: `data.split`.

    Raises:
      ConfigError: The source or split is unknown or empty, or its files or packages are missing.
    """
    data = config.data.copy_and_resolve_references()
    data.split = split = data.split if split is None else split
    kind = source_class(config)
    if storage.is_remote(data.path) and not kind.reads_buckets:
        raise ConfigError(
            f"config.data.path={data.path!r} lies in a bucket, and source {data.source} reads local files: copy it, "
            "mount it, or make records of it with --mode=prepare."
        )
    if kind.splits and split not in (*kind.splits, "all"):
        raise ConfigError(f"config.data.split={split!r} is unknown: one of {', '.join(kind.splits)}, all.")
    whole = kind.open(data, data.source.partition(":")[2])
    if not whole.splits or split == "all":
        return whole
    numbers = np.flatnonzero(whole.split_indices(data.test_share) == whole.splits.index(split))
    if not len(numbers):
        raise ConfigError(
            f"config.data.split={split!r} is empty: config.data.test_share={data.test_share} of {len(whole)} images."
        )
    return whole if len(numbers) == len(whole) and split == "train" else Subset(whole, numbers)
