"""Scores of a model's samples, from the reference and networks of a run.

`modes.evaluate`, `modes.sweep` and the scores during training (`training.hooks.Scores`) use it. A
score that needs more than the arrays of `shards.extract_features` is added in `compute_scores`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import judge, judge_paths, reference_statistics, shards
from madformer_jax.evaluation.memorization import TrainingFeatures
from madformer_jax.evaluation.networks import attribute_classifier, registry
from madformer_jax.evaluation.networks.attribute_classifier import AttributeClassifier
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.evaluation.reference_statistics import Reference
from madformer_jax.sampling import prompts
from madformer_jax.sampling.generation import SampleBatch
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
    judge.check_size(n, reference)
    network = registry.open_network(c.evaluate.network, judge_paths.network_path(c, workdir))
    image = pipeline.make_preprocessor(c).describe()
    reference_statistics.check_compatible(reference, path, network.describe(), image)
    training, s = None, derive_sizes(c)
    # Further inputs of single scores.
    inputs: dict[str, Any] = {"seam": {"blocks": [s.grid, s.columns]}}
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
        "scores": judge.SCORE_SETTINGS, **inputs,
    }  # fmt: skip
    return Judge(network, registry.make_extractor(network), reference, training, protocol, attributes)


def open_training(c: ConfigDict, reference: Reference | None = None) -> Reference:
    """Loads the reference file of the training images, `config.evaluate.training`.

    Args:
      c: The config.
      reference: The reference of the other scores, which must be a different one.

    Raises:
      ConfigError: The file is missing or damaged, has no features, or is `reference`.
    """
    training = reference_statistics.load(c.evaluate.training)
    if training.features is None or (reference is not None and training.digest == reference.digest):
        problem = "has no features" if training.features is None else "is the reference itself"
        raise ConfigError(
            f"config.evaluate.training={c.evaluate.training!r} {problem}: make one of the training images, "
            "--mode=reference with evaluate.split=train and another evaluate.reference."
        )
    return training


def _open_attribute_classifier(c: ConfigDict, workdir: str) -> AttributeClassifier | None:
    """Loads the attribute classifier, or returns None if no prompt names attributes.

    If the file does not exist, it logs a warning and returns None.
    """
    path = judge_paths.attribute_classifier_path(c, workdir)
    if prompts.requested_attributes(c) is None:
        return None
    if not epath.Path(path).exists():
        logging.warning("%s does not exist, so attributes are not scored: --mode=reference writes it", path)
        return None
    return attribute_classifier.load(path)


def extract_features(
    batches: Iterable[SampleBatch],
    extract: Callable[[np.ndarray], registry.NetworkOutputs],
    classifier: AttributeClassifier | None = None,
) -> shards.Arrays:
    """Extracts the features of samples while they are drawn.

    Args:
      batches: Batches of samples.
      extract: Computes a network's outputs, see `registry.make_extractor`.
      classifier: Predicts the attributes of the samples.

    Returns:
      The arrays of `shards.extract_features`, `attributes` (n, A) if a classifier is given, and
      `seconds` (batches, 2): the sampling time and the number of images of each batch.
    """
    collected: list[shards.Arrays] = []
    seconds = []
    start = time.monotonic()
    for batch in batches:
        seconds.append((time.monotonic() - start, len(batch.images)))
        rows = shards.process_slice(len(batch.images))
        arrays = shards.extract_features(extract, batch.images[rows], batch.labels[rows])
        if classifier is not None:
            arrays["attributes"] = attribute_classifier.predict(classifier, batch.images[rows])
        collected.append(shards.allgather_rows(arrays))
        start = time.monotonic()
    out = {name: np.concatenate([arrays[name] for arrays in collected]) for name in collected[0]}
    return {**out, "seconds": np.array(seconds)}


def compute_scores(
    c: ConfigDict, scorer: Judge, arrays: Mapping[str, np.ndarray], *, labeled: bool
) -> dict[str, judge.Score]:
    """Computes the scores of a set of images.

    Args:
      c: The config of the images.
      scorer: The reference and the networks.
      arrays: Arrays of `extract_features` or of `shards.extract_features`.
      labeled: Whether the labels are classes of the data.

    Returns:
      The scores by name, see `judge.compute_scores`.
    """
    s = derive_sizes(c)
    classes = scorer.network.metadata.get("classes", 0)
    out = judge.compute_scores(
        scorer.network.name, arrays, scorer.reference,
        recognize=labeled and bool(classes) and arrays["labels"].max() < classes,
        grid=(s.grid, s.columns), shape=(c.data.image_size,) * 2, training=scorer.training,
    )  # fmt: skip
    requested = prompts.requested_attributes(c)
    if "attributes" in arrays and requested is not None:
        out["attributes"] = judge.ratio_of_sums(*attribute_classifier.count_matches(requested, arrays["attributes"]))
    return out
