"""`Judge`: the reference and the feature networks that score every set of images of a run.

`modes.evaluate`, `modes.sweep` and `modes.train` open it, `sample_scores` and `score_summary` compute
scores with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import pipeline, sources
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import judge_paths, reference_statistics, sampling_grid, score_summary
from madformer_jax.evaluation.memorization import TrainingFeatures
from madformer_jax.evaluation.networks import attribute_classifier, registry
from madformer_jax.evaluation.networks.attribute_classifier import AttributeClassifier
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.evaluation.reference_statistics import Reference
from madformer_jax.sampling import prompts
from madformer_jax.weights.fingerprint import fingerprint


class Judge(NamedTuple):
    """The reference and the networks that score every set of images of a run."""

    network: Network
    extract: Callable[[np.ndarray], registry.NetworkOutputs]
    reference: Reference
    training: TrainingFeatures | None  # for the memorization score
    protocol: dict[str, Any]  # the protocol of a score, without its images
    attribute_classifier: AttributeClassifier | None = None  # if the prompts name attributes


def open_judge(c: ConfigDict, workdir: str, n: int) -> Judge:
    """Opens the reference and the networks that `config.evaluate` names, to score n images.

    Raises:
      ConfigError: The reference or the network's weights are missing or do not fit, or n is too
        small.
    """
    path = judge_paths.reference_path(c, workdir)
    reference = reference_statistics.load(path)
    score_summary.check_counts(n, score_summary.SPLITS if reference.features is None else len(reference.features))
    network = registry.open_network(c.evaluate.network, judge_paths.network_path(c, workdir))
    image = pipeline.make_preprocessor(c).describe()
    reference_statistics.check_compatible(reference, path, network.describe(), image)
    training, s = None, derive_sizes(c)
    # Further inputs of single scores.
    inputs: dict[str, Any] = {"seam": {"blocks": [s.grid, s.columns], "lines": c.evaluate.seam_lines}}
    if c.evaluate.training:
        training_reference = open_training(c, reference)
        reference_statistics.check_compatible(training_reference, c.evaluate.training, network.describe(), image)
        if reference.features is None:
            raise ConfigError(
                f"config.evaluate.training needs a reference with features, and {path} has none: make it with "
                "--mode=reference, or leave config.evaluate.training empty."
            )
        training = TrainingFeatures(training_reference, reference.features)
        inputs["training"] = training_reference.digest
    attributes = _open_attribute_classifier(c, workdir)
    if attributes is not None:
        weights = fingerprint(attributes.params)
        inputs["attributes"] = {"weights": weights, "accuracy": attributes.accuracy, "held_out": attributes.held_out}
    protocol = {
        "n": n, "reference": reference.digest, "network": network.describe(), "image": image,
        "scores": score_summary.SCORE_SETTINGS, **inputs,
    }  # fmt: skip
    return Judge(network, _make_extractor(c, network), reference, training, protocol, attributes)


def _make_extractor(c: ConfigDict, network: Network) -> Callable[[np.ndarray], registry.NetworkOutputs]:
    """Returns the extractor of a network, which also measures the inconsistency that the data source defines."""
    extract, source, name = registry.make_extractor(network), sources.source_class(c), c.data.source.partition(":")[2]

    def run(images: np.ndarray) -> registry.NetworkOutputs:
        return extract(images)._replace(inconsistency=source.inconsistency(name, images))

    return run


def open_training(c: ConfigDict, reference: Reference | None = None) -> Reference:
    """Loads the reference file of the training images, `config.evaluate.training`.

    Args:
      reference: The reference of the other scores, which must be a different one.

    Raises:
      ConfigError: The file is missing or damaged, has no features, or is `reference`.
    """
    training = reference_statistics.load(c.evaluate.training)
    if training.features is None or (reference is not None and training.digest == reference.digest):
        problem = "has no features" if training.features is None else "is the reference itself"
        raise ConfigError(
            f"config.evaluate.training={c.evaluate.training!r} {problem}: make a reference of the training images "
            "with --mode=reference, evaluate.split=train and another evaluate.reference."
        )
    return training


def _open_attribute_classifier(c: ConfigDict, workdir: str) -> AttributeClassifier | None:
    """Loads the attribute classifier, or returns None if no prompt of the config or its grid names attributes.

    If the file does not exist, it logs a warning and returns None.
    """
    path = judge_paths.attribute_classifier_path(c, workdir)
    settings = {setting.sample.prompts: setting for setting in (c, *sampling_grid.expand_configs(c))}
    if all(prompts.requested_attributes(setting) is None for setting in settings.values()):
        return None
    if not epath.Path(path).exists():
        logging.warning("%s does not exist, so attributes are not scored: --mode=reference writes it", path)
        return None
    return attribute_classifier.load(path)
