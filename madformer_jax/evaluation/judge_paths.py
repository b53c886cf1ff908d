"""Paths of a run's reference and feature networks.

Paths in the config take precedence over the default paths in the workdir. The modes and the command
line call these functions.
"""

import os

from ml_collections import ConfigDict

from madformer_jax.evaluation.networks import registry
from madformer_jax.evaluation.networks.attribute_classifier import AttributeNetwork


def reference_path(c: ConfigDict, workdir: str) -> str:
    """Returns the path of the reference file."""
    return c.evaluate.reference or os.path.join(workdir, "reference.npz")


def attribute_classifier_path(c: ConfigDict, workdir: str) -> str:
    """Returns the path of the attribute classifier, which scores the agreement with captions.

    It is the feature network if that is the attribute classifier, otherwise a file next to the
    reference.
    """
    if registry.network_class(c.evaluate.network) is AttributeNetwork:
        return network_path(c, workdir)
    return os.path.join(os.path.dirname(reference_path(c, workdir)), AttributeNetwork.weights_file)


def network_path(c: ConfigDict, workdir: str) -> str:
    """Returns the path of the feature network's weights.

    --mode=reference or --mode=convert writes them.
    """
    weights_file = registry.network_class(c.evaluate.network).weights_file
    return c.evaluate.network_path or os.path.join(workdir, weights_file)
