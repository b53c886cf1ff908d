"""Where a run's judge lies, unless the config says otherwise: in its workdir."""

import os

from ml_collections import ConfigDict

_WEIGHT_FILES = {"classifier": "classifier.npz", "attributes": "attributes.npz"}


def reference_path(c: ConfigDict, workdir: str) -> str:
    return c.evaluate.reference or os.path.join(workdir, "reference.npz")


def attribute_classifier_path(c: ConfigDict, workdir: str) -> str:
    """The reader of attributes, which judges what a model makes of captions: the network, or beside the reference."""
    if c.evaluate.network == "attributes":
        return network_path(c, workdir)
    return os.path.join(os.path.dirname(reference_path(c, workdir)), _WEIGHT_FILES["attributes"])


def network_path(c: ConfigDict, workdir: str) -> str:
    """The network's weights: what --mode=reference or --mode=convert writes."""
    name = c.evaluate.network
    return c.evaluate.network_path or os.path.join(workdir, _WEIGHT_FILES.get(name, name))
