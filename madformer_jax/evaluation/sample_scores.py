"""A model's samples before a judge: what --mode=evaluate and the scores of a training share."""

import time
from collections.abc import Iterable, Mapping
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
    """What judges: the same for every set of images of a run."""

    network: Network
    extract: Any
    reference: Reference
    training: TrainingFeatures | None
    protocol: dict[str, Any]  # all of it but the images
    reader: AttributeClassifier | None = None  # of attributes, where the prompts ask for some


def open_judge(c: ConfigDict, workdir: str, n: int) -> Judge:
    """What `config.evaluate` names to judge n images.

    Raises:
      ConfigError: the reference or the network's weights are missing or do not fit, or n is too small.
    """
    where = judge_paths.reference_path(c, workdir)
    found = reference_statistics.load(where)
    judge.check_size(n, found)
    network = registry.open_network(c.evaluate.network, judge_paths.network_path(c, workdir))
    image = pipeline.make_preprocessor(c).describe()
    reference_statistics.check_compatible(found, where, network.describe(), image)
    training, s = None, derive_sizes(c)
    inputs: dict[str, Any] = {"seam": {"blocks": [s.grid, s.columns]}}  # of single scores
    if c.evaluate.training:
        other = open_training(c, found)
        reference_statistics.check_compatible(other, c.evaluate.training, network.describe(), image)
        if found.features is None:
            raise ConfigError(
                f"config.evaluate.training needs a reference with features, and {where} has none: make it with "
                "--mode=reference, or leave config.evaluate.training empty."
            )
        training = TrainingFeatures(other, found.features)
        inputs["training"] = other.digest
    reads = _open_attribute_classifier(c, workdir)
    if reads is not None:
        weights = fingerprint(reads.params)
        inputs["attributes"] = {"weights": weights, "accuracy": reads.accuracy, "held_out": reads.held_out}
    protocol = {
        "n": n, "reference": found.digest, "network": network.describe(), "image": image, "scores": judge.SCORE_SETTINGS, **inputs,
    }  # fmt: skip
    return Judge(network, registry.make_extractor(network), found, training, protocol, reads)


def open_training(c: ConfigDict, beside: Reference | None = None) -> Reference:
    """The statistics of the training images, with their features.

    Raises:
      ConfigError: They do not open, have no features, or are the reference `beside`.
    """
    found = reference_statistics.load(c.evaluate.training)
    if found.features is None or (beside is not None and found.digest == beside.digest):
        what = "has no features" if found.features is None else "is the reference itself"
        raise ConfigError(
            f"config.evaluate.training={c.evaluate.training!r} {what}: make one of the training images, "
            "--mode=reference with evaluate.split=train and another evaluate.reference."
        )
    return found


def _open_attribute_classifier(c: ConfigDict, workdir: str) -> AttributeClassifier | None:
    path = judge_paths.attribute_classifier_path(c, workdir)
    if prompts.requested_attributes(c) is None:
        return None
    if not epath.Path(path).exists():
        logging.warning("there is no %s: --mode=reference writes it; attributes are not judged without", path)
        return None
    return attribute_classifier.load(path)


def extract_features(
    batches: Iterable[SampleBatch], extract: Any, reads: AttributeClassifier | None = None
) -> shards.Arrays:
    """What `parts.look` keeps of images as they are drawn, and the attributes that `reads` reads; for each batch its seconds of
    drawing and its images.
    """
    found: list[shards.Arrays] = []
    seconds = []
    began = time.monotonic()
    for batch in batches:
        seconds.append((time.monotonic() - began, len(batch.images)))
        mine = shards.process_slice(len(batch.images))
        kept = shards.extract_features(extract, batch.images[mine], batch.labels[mine])
        if reads is not None:
            kept["attributes"] = attribute_classifier.predict(reads, batch.images[mine])
        found.append(shards.allgather_rows(kept))
        began = time.monotonic()
    out = {name: np.concatenate([x[name] for x in found]) for name in found[0]}
    return {**out, "seconds": np.array(seconds)}


def compute_scores(
    c: ConfigDict, by: Judge, found: Mapping[str, np.ndarray], *, labelled: bool
) -> dict[str, judge.Score]:
    """`judge.compute_scores` of what was found in a model's images or others; `labelled`: they have the classes of the data."""
    s = derive_sizes(c)
    classes = by.network.about.get("classes", 0)
    out = judge.compute_scores(
        by.network.name, found, by.reference,
        recognise=labelled and bool(classes) and found["labels"].max() < classes,
        grid=(s.grid, s.columns), shape=(c.data.image_size,) * 2, training=by.training,
    )  # fmt: skip
    asked = prompts.requested_attributes(c)
    if "attributes" in found and asked is not None:
        out["attributes"] = judge.ratio_of_sums(*attribute_classifier.count_matches(asked, found["attributes"]))
    return out
