"""--mode=reference: statistics of a data set that scores compare with.

    python -m madformer_jax.main --config=... --mode=reference --workdir=DIR

Writes the reference of `evaluate.split` to `evaluate.reference`, by default DIR/reference.npz. It
first trains a network that learns from the data set (`Network.learns`), unless its file exists. A
killed run continues at its first missing shard. Several processes share the images. `modes.sweep`
also calls `run`.
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
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images, judge_paths, reference_statistics, shards
from madformer_jax.evaluation.networks import fit, registry
from madformer_jax.evaluation.networks.attribute_classifier import AttributeNetwork
from madformer_jax.evaluation.networks.network import Network, TrainingSet
from madformer_jax.runtime import partitioning
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import prompts

MAX_TRAINING_IMAGES = 50_000  # of a network that learns from the data set
# A network that learns attributes trains on 3 times the config's images, if the source can make
# more of them, because it overfits on fewer.
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
        for kind, path in _learning_networks(c, workdir).items():
            _train_network(c, kind, path)
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
    extracted = images.extract_missing_shards(data, registry.make_extractor(network, embed=False), unreadable, missing)
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
    kind, learning = registry.network_class(c.evaluate.network), _learning_networks(c, workdir)
    if kind.learns == "attributes" and not sources.source_class(c).attributes:
        raise ConfigError(
            f"config.evaluate.network={kind.name} needs pictures whose attributes are known, config.data.source="
            f"{' or '.join(name for name, source in sources.SOURCES.items() if source.attributes)}, and it is "
            f"{c.data.source}: use another network."
        )
    learns_attributes = any(network.learns == "attributes" for network in learning)
    if learns_attributes and c.data.channels != 3:
        raise ConfigError(
            f"config.data.channels={c.data.channels}: the attribute classifier needs color pictures: set config.data.channels=3."
        )
    data = images.from_source(c, c.evaluate.split, shuffled=False, config_field="evaluate.split")
    if data.n < 2:
        raise ConfigError(
            f"config.evaluate.split={c.evaluate.split!r} has {data.n} image(s), and a reference needs two: use another split."
        )
    for network, path in learning.items():
        if epath.Path(path).exists():
            _check_channels(c, network.open(path), path)
        elif network.learns == "attributes":  # Its accuracy is measured on held-out pictures.
            sources.open_source(c, "test")
        else:
            _split_examples(c)
    if kind not in learning:
        weights_path = judge_paths.network_path(c, workdir)
        _check_channels(c, kind.open(weights_path), weights_path)
    return data


def _learning_networks(c: ConfigDict, workdir: str) -> dict[type[Network], str]:
    """Returns the networks that learn from the data set, and the paths of their weights.

    They are the feature network, if it learns, and the attribute classifier, if captions name attributes.
    """
    kind = registry.network_class(c.evaluate.network)
    paths = {kind: judge_paths.network_path(c, workdir)} if kind.learns else {}
    if prompts.names_attributes(c):
        paths[AttributeNetwork] = judge_paths.attribute_classifier_path(c, workdir)
    return paths


def _check_channels(c: ConfigDict, network: Network, path: str) -> None:
    if c.data.channels not in network.channels:
        raise ConfigError(
            f"config.data.channels={c.data.channels}: the network {path} takes images of "
            f"{' or '.join(map(str, network.channels))}: set that, or name another in config.evaluate.network_path."
        )


class _Examples(NamedTuple):
    """Training or test images of a network that learns labels."""

    images: images.ImageSet
    numbers: np.ndarray  # indices in `images`


def _split_examples(c: ConfigDict) -> tuple[_Examples, _Examples]:
    """Returns the training and the test images of a network that learns labels.

    They are the splits "train" and "test" if the source holds images out itself (`Source.splits`,
    `data.test_share`). Otherwise every tenth image of `data.split` is held out.
    """
    if not sources.source_class(c).splits or not c.data.test_share:
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
            f"config.evaluate.network={c.evaluate.network} needs labeled images of two classes or more, and "
            f"config.data.source={c.data.source} has {classes}: use evaluate.network=inception."
        )
    if not len(test.numbers):
        raise ConfigError(
            f"config.evaluate.network={c.evaluate.network} needs held-out images, and {train.images.n} images are too few to hold "
            "some out: give more, or use evaluate.network=inception."
        )
    return train, test


def _train_network(c: ConfigDict, kind: type[Network], path: str) -> None:
    """Trains a network on the data set and writes it to `path`, unless the file exists.

    Only the first process does so.
    """
    if jax.process_index() or epath.Path(path).exists():
        return
    if kind.learns == "labels":
        training, held_out = (
            _load_labeled(data, numbers[:MAX_TRAINING_IMAGES], kind, c.data.max_corrupt)
            for data, numbers in _split_examples(c)
        )
    else:
        training, held_out = _load_attributes(c, "train", kind, TRAIN_MULTIPLIER), _load_attributes(c, "test", kind)
    kind.train(path, training, held_out)


def make_attribute_classifier(c: ConfigDict, path: str) -> None:
    """Trains the attribute classifier and writes it to `path`, unless the file exists."""
    _train_network(c, AttributeNetwork, path)


def _load_attributes(c: ConfigDict, split: str, kind: type[Network], factor: int = 1) -> TrainingSet:
    """Loads the images of a split, at the input size of a network, and the attributes that their captions name.

    There are `factor` times as many images as the config has, if the source can make more.
    """
    c = c.copy_and_resolve_references()
    sources.source_class(c).enlarge(c.data, factor)
    source, preprocessor = sources.open_source(c, split), pipeline.make_preprocessor(c)
    pixels, attributes = [], []
    n = min(len(source), MAX_TRAINING_IMAGES)
    for first in range(0, n, shards.MAX_BATCH):
        numbers = np.arange(first, min(n, first + shards.MAX_BATCH))
        batch = preprocessor.process_batch(source.read(numbers).arrays["image"])
        pixels.append(np.asarray(fit.resize(batch, kind.input_sizes)))
        attributes.append(np.asarray(source.captioned_attributes(numbers)))
    values = tuple(len(names) for _, names in source.attributes)
    return TrainingSet(np.concatenate(pixels), np.concatenate(attributes), values)


def _load_labeled(data: images.ImageSet, numbers: np.ndarray, kind: type[Network], max_corrupt: float) -> TrainingSet:
    """Loads images by index, at the input size of a network, and their labels.

    At most the fraction `max_corrupt` of the images may be unreadable.
    """
    batches = (numbers[i : i + shards.MAX_BATCH] for i in range(0, len(numbers), shards.MAX_BATCH))
    pixels, labels, unreadable = [], [], images.UnreadableImages(len(numbers), max_corrupt)
    for batch in shards.prefetch(data.read(indices) for indices in batches):
        unreadable.add(batch.unreadable)
        pixels.append(np.asarray(fit.resize(batch.images, kind.input_sizes)))
        labels.append(batch.labels)
    return TrainingSet(np.concatenate(pixels), np.concatenate(labels), (data.classes,))
