"""Scores of a model's samples.

`modes.evaluate`, `modes.sweep` and the scores during training (`training.hooks.Scores`) use it. A
score that needs more than the arrays of `shards.extract_features` is added in `compute_scores`.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.evaluation import score_summary, shards
from madformer_jax.evaluation.judge import Judge
from madformer_jax.evaluation.networks import attribute_classifier, registry
from madformer_jax.evaluation.networks.attribute_classifier import AttributeClassifier
from madformer_jax.sampling import prompts
from madformer_jax.sampling.generation import SampleBatch


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
    c: ConfigDict, judge: Judge, arrays: Mapping[str, np.ndarray], *, labeled: bool
) -> dict[str, score_summary.Score]:
    """Computes the scores of a set of images.

    Args:
      arrays: Arrays of `extract_features` or of `shards.extract_features`.
      labeled: Whether the labels are classes of the data.

    Returns:
      The scores by name, see `score_summary.compute_scores`.
    """
    s = derive_sizes(c)
    classes = judge.network.metadata.get("classes", 0)
    out = score_summary.compute_scores(
        judge.network, arrays, judge.reference,
        recognize=labeled and bool(classes) and arrays["labels"].max(initial=0) < classes,
        grid=(s.grid, s.columns), shape=(c.data.image_size,) * 2, seam_lines=c.evaluate.seam_lines, training=judge.training,
    )  # fmt: skip
    requested = prompts.requested_attributes(c)
    if "attributes" in arrays and requested is not None:
        out["attributes"] = score_summary.share_of_sums(
            *attribute_classifier.count_matches(requested, arrays["attributes"])
        )
    return out
