"""--mode=reference: statistics of a data set that scores compare with.

    python -m madformer_jax.main --config=... --mode=reference --workdir=DIR

Writes the reference of `evaluate.split` to `evaluate.reference`, by default DIR/reference.npz. With
`evaluate.network=classifier` or `attributes` it first trains the network, unless its file exists. A
killed run continues at its first missing shard. Several processes share the images. `modes.sweep`
also calls `run`. Training of a new network on the data set is added in `run`, and its checks in
`check`.
"""

import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from madformer_jax.config import schema as config_lib
from madformer_jax.data import pipeline, sources
from madformer_jax.data.drawings import pictures
from madformer_jax.data.drawings.attributes import ATTRIBUTES
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images, judge_paths, reference_statistics, shards
from madformer_jax.evaluation.networks import attribute_classifier, classifier, registry
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.runtime import partitioning
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import prompts

MAX_TRAINING_IMAGES = 50_000  # for the classifier and for the attribute classifier
# The attribute classifier trains on 3 times the config's drawings, because it overfits on fewer.
TRAIN_MULTIPLIER = 3
HOLD_OUT_STRIDE = 10  # Every tenth image is held out if the source has no test split.


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes the reference of the images of split `evaluate.split`.

    Returns:
      The path of the reference and its protocol.

    Raises:
      ConfigError: A setting is wrong, or the source does not open, has no labels for the
        classifier, or has too few images.
    """
    data = check(c, workdir)
    weights_path = judge_paths.network_path(c, workdir)
    with shards.exclusive_lock(epath.Path(workdir) / "references" / "networks"):
        if c.evaluate.network == "classifier" and not epath.Path(weights_path).exists():
            _train_classifier(c, weights_path)
        if c.evaluate.network == "attributes" or prompts.uses_drawing_captions(c):
            make_attribute_classifier(c, judge_paths.attribute_classifier_path(c, workdir))
        partitioning.sync("classifier")
    network = registry.open_network(c.evaluate.network, weights_path)
    protocol = {**data.protocol, "image": pipeline.make_preprocessor(c).describe(), "network": network.describe()}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    folder, path = epath.Path(workdir) / "references" / key, judge_paths.reference_path(c, workdir)
    with shards.exclusive_lock(folder):
        collected = shards.Shards(folder, data.n, shards.read_batch_size(c))
        unreadable = _extract_missing_shards(c, data, network, collected)
        if jax.process_index() == 0:
            classes = network.metadata.get("classes", 0) if data.classes else 0
            digest = reference_statistics.save(path, protocol, collected.iterate, classes)
            collected.remove()
            n = data.n - len(unreadable.errors)
            logging.info("wrote the reference %s of %d images, split %s: %s", digest, n, c.evaluate.split, path)
        partitioning.sync("reference")
    return {"reference": path, **protocol}


def _extract_missing_shards(
    c: ConfigDict, data: images.ImageSet, network: Network, collected: shards.Shards
) -> images.UnreadableImages:
    """Writes the missing shards and returns the unreadable images.

    A shard of a reference holds the mean profile of its images and its weight, instead of all
    profiles.
    """
    missing, unreadable = collected.missing(), images.UnreadableImages(data.n, c.data.max_corrupt)
    extracted = images.extract_missing_shards(data, registry.make_extractor(network), unreadable, missing)
    with tqdm(
        total=sum(shard.n for shard in missing), desc="reference", unit="image", disable=jax.process_index() != 0
    ) as bar:
        for shard, arrays in interruptible(zip(missing, extracted)):
            arrays["weight"] = np.array([len(arrays["labels"])])
            arrays["profile"] = arrays["profile"].sum(axis=0, keepdims=True) / max(1, len(arrays["labels"]))
            arrays.pop("logits", None)
            collected.write(shard, arrays)
            bar.update(shard.n)
    return unreadable


def check(c: ConfigDict, workdir: str) -> images.ImageSet:
    """Checks that the reference can be made, before anything is written.

    Returns:
      The images of the reference.

    Raises:
      ConfigError: A setting is wrong, the images do not open or are too few, or the network can
        neither be opened nor trained.
    """
    config_lib.validate(c)
    name = c.evaluate.network
    weights_path = judge_paths.network_path(c, workdir)
    attributes_path = judge_paths.attribute_classifier_path(c, workdir)
    if name == "attributes" and c.data.source != "drawings":
        raise ConfigError(
            "config.evaluate.network=attributes needs pictures whose attributes are known, config.data.source=drawings, and it "
            f"is {c.data.source}: use classifier or inception."
        )
    needs_attributes = name == "attributes" or prompts.uses_drawing_captions(c)
    if needs_attributes and c.data.channels != 3:
        raise ConfigError(f"config.data.channels={c.data.channels}: the attribute classifier needs pictures of 3.")
    data = images.from_source(c, c.evaluate.split, shuffled=False, config_field="evaluate.split")
    if data.n < 2:
        raise ConfigError(f"a reference of {data.n} images is too small: a covariance needs at least two.")
    if needs_attributes and epath.Path(attributes_path).exists():
        attribute_classifier.load(attributes_path)
    elif needs_attributes:  # Its accuracy is measured on held-out pictures.
        pictures.open_split("test", c.data.drawings, c.data.image_size, c.data.test_share)
    if name not in ("classifier", "attributes") or epath.Path(weights_path).exists():
        _check_channels(c, registry.open_network(name, weights_path), weights_path)
    elif name == "classifier":
        _split_examples(c)
    return data


def _check_channels(c: ConfigDict, network: Network, path: str) -> None:
    if c.data.channels not in network.channels:
        raise ConfigError(
            f"config.data.channels={c.data.channels}: the network {path} takes images of "
            f"{' or '.join(map(str, network.channels))}: set that, or name another in config.evaluate.network_path."
        )


class _Examples(NamedTuple):
    """Training or test images of the classifier."""

    images: images.ImageSet
    numbers: np.ndarray  # indices in `images`


def _split_examples(c: ConfigDict) -> tuple[_Examples, _Examples]:
    """Returns the training and the test images of the classifier.

    They are the splits "train" and "test". If the source has no test split, every tenth image is
    held out.

    Raises:
      ConfigError: A split does not open, the images have less than two classes, or none are held
        out.
    """
    if c.data.source.startswith("tfds:") or c.data.source == "arrayrecord" or not c.data.test_share:
        source = images.from_source(c, c.data.split, shuffled=True, config_field="evaluate.network")
        is_test = np.arange(source.n) % HOLD_OUT_STRIDE == HOLD_OUT_STRIDE - 1
        train, test = _Examples(source, np.flatnonzero(~is_test)), _Examples(source, np.flatnonzero(is_test))
    else:
        splits = [
            images.from_source(c, split, shuffled=True, config_field="evaluate.network") for split in ("train", "test")
        ]
        train, test = (_Examples(data, np.arange(data.n)) for data in splits)
    if train.images.classes < 2:
        classes = "one class" if train.images.classes else "none"
        raise ConfigError(
            "config.evaluate.network=classifier needs labeled images of two classes or more, and "
            f"config.data.source={c.data.source} has {classes}: use evaluate.network=inception."
        )
    if not len(test.numbers):
        raise ConfigError(
            f"config.evaluate.network=classifier needs held-out images, and {train.images.n} images are too few to hold some "
            "out: give more, or use evaluate.network=inception."
        )
    return train, test


def _train_classifier(c: ConfigDict, path: str) -> None:
    """Trains and tests the classifier and writes it, in the first process."""
    if jax.process_index():
        return
    train, test = _split_examples(c)
    (train_images, labels), (held_out_images, held_out_labels) = (
        _load_examples(data, numbers[:MAX_TRAINING_IMAGES], c.data.max_corrupt) for data, numbers in (train, test)
    )
    trained = classifier.train(train_images, labels, held_out_images, held_out_labels)
    classifier.save(path, trained)
    logging.info(
        "the classifier is right on %.2f %% of %d held-out images: %s", 100 * trained.accuracy, trained.held_out, path
    )


def make_attribute_classifier(c: ConfigDict, path: str) -> None:
    """Trains the attribute classifier and writes it, unless the file exists.

    Only the first process does so.
    """
    if jax.process_index() or epath.Path(path).exists():
        return
    train, test = (
        _load_drawings(c, "train", TRAIN_MULTIPLIER * c.data.drawings),
        _load_drawings(c, "test", c.data.drawings),
    )
    values = [len(names) for _, names in ATTRIBUTES]
    trained = attribute_classifier.train(*train, *test, values)
    attribute_classifier.save(path, trained)
    logging.info(
        "the attribute classifier is right on %.2f %% of the attributes that the captions of %d held-out drawings name: %s",
        100 * trained.accuracy, trained.held_out, path,
    )  # fmt: skip


def _load_drawings(c: ConfigDict, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads those of the first `count` drawings that belong to a split.

    Returns:
      Pictures uint8 (n, s, s, 3) at the input size of the attribute classifier, and the attributes
      (n, A) that their captions name.
    """
    c = c.copy_and_resolve_references()
    c.data.split, c.data.drawings = split, count
    source, preprocessor = sources.open_source(c), pipeline.make_preprocessor(c)
    pixels, attributes = [], []
    n = min(len(source), MAX_TRAINING_IMAGES)
    for first in range(0, n, shards.MAX_BATCH):
        batch = source.read(np.arange(first, min(n, first + shards.MAX_BATCH)))
        pixels.append(attribute_classifier.downscale(preprocessor.process_batch(batch.arrays["image"])))
        attributes.append(pictures.captioned_attributes(np.asarray(batch.attributes)))
    return np.concatenate(pixels), np.concatenate(attributes)


def _load_examples(data: images.ImageSet, numbers: np.ndarray, max_corrupt: float) -> tuple[np.ndarray, np.ndarray]:
    """Loads images by index, at the input size of the classifier, and their labels.

    Args:
      data: The images.
      numbers: Indices of the images to load.
      max_corrupt: Largest fraction of unreadable images.

    Raises:
      ConfigError: Too many images are unreadable.
    """
    batches = (numbers[i : i + shards.MAX_BATCH] for i in range(0, len(numbers), shards.MAX_BATCH))
    pixels, labels, unreadable = [], [], images.UnreadableImages(len(numbers), max_corrupt)
    for batch in shards.prefetch(data.read(indices) for indices in batches):
        unreadable.add(batch.unreadable)
        pixels.append(classifier.downscale(batch.images))
        labels.append(batch.labels)
    return np.concatenate(pixels), np.concatenate(labels)
