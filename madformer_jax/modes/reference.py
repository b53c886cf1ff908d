"""--mode=reference: statistics of a data set, for scores to compare with.

    python -m madformer_jax.main --config=... --mode=reference --workdir=DIR [--config.evaluate.split=test]

Writes `evaluate.reference` (DIR/reference.npz). With `evaluate.network=classifier` or `attributes` the network itself is trained
first, unless it is there. Killed, it goes on; over several processes each image is looked at once.
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

MAX_TRAINING_IMAGES = 50_000  # images that the classifier learns from, at most
TRAIN_MULTIPLIER = 3  # times the config's drawings are there for the reader to learn from: of fewer it knows by heart what it does not see
HOLD_OUT_STRIDE = 10  # every tenth image, where the source holds none out itself


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes the reference of the images of split `evaluate.split`; returns its protocol.

    Raises:
      ConfigError: a setting is wrong, the source does not open, has no labels for the classifier, or holds too few images.
    """
    data = check(c, workdir)
    where = judge_paths.network_path(c, workdir)
    with shards.exclusive_lock(epath.Path(workdir) / "references" / "networks"):
        if c.evaluate.network == "classifier" and not epath.Path(where).exists():
            _train_classifier(c, where)
        if c.evaluate.network == "attributes" or prompts.uses_drawing_captions(c):
            make_attribute_classifier(c, judge_paths.attribute_classifier_path(c, workdir))
        partitioning.sync("classifier")
    network = registry.open_network(c.evaluate.network, where)
    protocol = {**data.about, "image": pipeline.make_preprocessor(c).describe(), "network": network.describe()}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    folder, path = epath.Path(workdir) / "references" / key, judge_paths.reference_path(c, workdir)
    with shards.exclusive_lock(folder):
        collected = shards.Shards(folder, data.n, shards.read_batch_size(c))
        unread = _extract_missing_shards(c, data, network, collected)
        if jax.process_index() == 0:
            classes = network.about.get("classes", 0) if data.classes else 0
            digest = reference_statistics.save(path, protocol, collected.each, classes)
            collected.remove()
            n = data.n - len(unread.told)
            logging.info("wrote the reference %s of %d images, split %s: %s", digest, n, c.evaluate.split, path)
        partitioning.sync("reference")
    return {"reference": path, **protocol}


def _extract_missing_shards(
    c: ConfigDict, data: images.ImageSet, network: Network, collected: shards.Shards
) -> images.UnreadableImages:
    """Writes the missing parts; returns which images cannot be read."""
    missing, unread = collected.missing(), images.UnreadableImages(data.n, c.data.max_corrupt)
    looked = images.extract_missing_shards(data, registry.make_extractor(network), unread, missing)
    with tqdm(total=sum(p.n for p in missing), desc="reference", unit="image", disable=jax.process_index() != 0) as bar:
        for part, found in interruptible(zip(missing, looked)):
            found["weight"] = np.array([len(found["labels"])])
            found["profile"] = found["profile"].sum(axis=0, keepdims=True) / max(1, len(found["labels"]))
            found.pop("logits", None)
            collected.write(part, found)
            bar.update(part.n)
    return unread


def check(c: ConfigDict, workdir: str) -> images.ImageSet:
    """Refuses, before anything is made, a reference that cannot be made; returns its images.

    Raises:
      ConfigError: A setting is wrong, or the images, or what its network is trained on or loaded from, do not open or do not
        suffice.
    """
    config_lib.validate(c)
    name, where, reads = (
        c.evaluate.network,
        judge_paths.network_path(c, workdir),
        judge_paths.attribute_classifier_path(c, workdir),
    )
    if name == "attributes" and c.data.source != "drawings":
        raise ConfigError(
            "config.evaluate.network=attributes needs pictures whose attributes are known, config.data.source=drawings, and it "
            f"is {c.data.source}: use classifier or inception."
        )
    needs_reader = name == "attributes" or prompts.uses_drawing_captions(c)
    if needs_reader and c.data.channels != 3:
        raise ConfigError(f"config.data.channels={c.data.channels}: the reader of attributes needs pictures of 3.")
    data = images.from_source(c, c.evaluate.split, shuffled=False, asked="evaluate.split")
    if data.n < 2:
        raise ConfigError(f"a reference of {data.n} images: a covariance needs two at least.")
    if needs_reader and epath.Path(reads).exists():
        attribute_classifier.load(reads)
    elif needs_reader:  # which is tested on held-out pictures
        pictures.open_split("test", c.data.drawings, c.data.image_size, c.data.test_share)
    if name not in ("classifier", "attributes") or epath.Path(where).exists():
        _check_channels(c, registry.open_network(name, where), where)
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
    """Images to train the classifier on, or to test it on."""

    images: images.ImageSet
    numbers: np.ndarray


def _split_examples(c: ConfigDict) -> tuple[_Examples, _Examples]:
    """What the classifier is trained on, the split "train", and what it is tested on, "test".

    A source without a test split of ours has every tenth image held out.

    Raises:
      ConfigError: A split does not open, or the images are not of two classes or more.
    """
    if c.data.source.startswith("tfds:") or c.data.source == "arrayrecord" or not c.data.test_share:
        whole = images.from_source(c, c.data.split, shuffled=True, asked="evaluate.network")
        last = np.arange(whole.n) % HOLD_OUT_STRIDE == HOLD_OUT_STRIDE - 1
        train, test = _Examples(whole, np.flatnonzero(~last)), _Examples(whole, np.flatnonzero(last))
    else:
        train, test = (
            _Examples(data := images.from_source(c, split, shuffled=True, asked="evaluate.network"), np.arange(data.n))
            for split in ("train", "test")
        )
    if train.images.classes < 2:
        found = "one class" if train.images.classes else "none"
        raise ConfigError(
            "config.evaluate.network=classifier needs labelled images of two classes or more, and "
            f"config.data.source={c.data.source} has {found}: use evaluate.network=inception."
        )
    if not len(test.numbers):
        raise ConfigError(
            f"config.evaluate.network=classifier needs held-out images, and {train.images.n} images are too few to hold some "
            "out: give more, or use evaluate.network=inception."
        )
    return train, test


def _train_classifier(c: ConfigDict, path: str) -> None:
    """Trains the classifier, tests it, and writes it; the first process does so alone."""
    if jax.process_index():
        return
    train, test = _split_examples(c)
    (seen, labels), (held, held_labels) = (
        _load_examples(data, numbers[:MAX_TRAINING_IMAGES], c.data.max_corrupt) for data, numbers in (train, test)
    )
    trained = classifier.train(seen, labels, held, held_labels)
    classifier.save(path, trained)
    logging.info(
        "the classifier is right on %.2f %% of %d held-out images: %s", 100 * trained.accuracy, trained.held_out, path
    )


def make_attribute_classifier(c: ConfigDict, path: str) -> None:
    """Trains the reader of attributes, unless it is there."""
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
        "the reader is right on %.2f %% of the attributes that the captions of %d held-out drawings name: %s",
        100 * trained.accuracy, trained.held_out, path,
    )  # fmt: skip


def _load_drawings(c: ConfigDict, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of the first `count` drawings that are of a split, and the attributes that their captions name."""
    c = c.copy_and_resolve_references()
    c.data.split, c.data.drawings = split, count
    source, table = sources.open_source(c), pipeline.make_preprocessor(c)
    pixels, rows = [], []
    for first in range(0, min(len(source), MAX_TRAINING_IMAGES), shards.MAX_BATCH):
        found = source.read(np.arange(first, min(len(source), MAX_TRAINING_IMAGES, first + shards.MAX_BATCH)))
        pixels.append(attribute_classifier.downscale(table.process_batch(found.arrays["image"])))
        rows.append(pictures.captioned_attributes(np.asarray(found.attributes)))
    return np.concatenate(pixels), np.concatenate(rows)


def _load_examples(data: images.ImageSet, numbers: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Images, as small as the classifier takes them, and labels; `most` of them may be unreadable."""
    batches = (numbers[i : i + shards.MAX_BATCH] for i in range(0, len(numbers), shards.MAX_BATCH))
    pixels, labels, unread = [], [], images.UnreadableImages(len(numbers), most)
    for rows in shards.prefetch(data.read(batch) for batch in batches):
        unread.add(rows.unread)
        pixels.append(classifier.downscale(rows.images))
        labels.append(rows.labels)
    return np.concatenate(pixels), np.concatenate(labels)
