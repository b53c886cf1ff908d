"""Paths of a run's reference and feature networks.

Paths in the config take precedence over the default paths in the workdir. The modes and the command
line call these functions. A network that --mode=reference trains needs an entry in `_WEIGHT_FILES`.
"""

import os

from ml_collections import ConfigDict

_WEIGHT_FILES = {"classifier": "classifier.npz", "attributes": "attributes.npz"}


def reference_path(c: ConfigDict, workdir: str) -> str:
    """Returns the path of the reference file."""
    return c.evaluate.reference or os.path.join(workdir, "reference.npz")


def attribute_classifier_path(c: ConfigDict, workdir: str) -> str:
    """Returns the path of the attribute classifier, which scores the agreement with captions.

    It is the feature network if that is `attributes`, otherwise a file next to the reference.
    """
    if c.evaluate.network == "attributes":
        return network_path(c, workdir)
    return os.path.join(os.path.dirname(reference_path(c, workdir)), _WEIGHT_FILES["attributes"])


def network_path(c: ConfigDict, workdir: str) -> str:
    """Returns the path of the feature network's weights.

    --mode=reference or --mode=convert writes them.
    """
    name = c.evaluate.network
    return c.evaluate.network_path or os.path.join(workdir, _WEIGHT_FILES.get(name, name))
