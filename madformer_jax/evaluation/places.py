"""Where a run's judge lies, unless the config says otherwise: in its workdir."""

import os

from ml_collections import ConfigDict


def reference_path(c: ConfigDict, workdir: str) -> str:
    return c.evaluate.reference or os.path.join(workdir, "reference.npz")


def reader_path(c: ConfigDict, workdir: str) -> str:
    """The reader of attributes, where the data have some and the model reads captions: what --mode=reference writes."""
    return os.path.join(workdir, "attributes.npz")


def network_path(c: ConfigDict, workdir: str) -> str:
    """The network's weights: what --mode=reference or --mode=convert writes."""
    name = {"classifier": "classifier.npz"}.get(c.evaluate.network, c.evaluate.network)
    return c.evaluate.network_path or os.path.join(workdir, name)
