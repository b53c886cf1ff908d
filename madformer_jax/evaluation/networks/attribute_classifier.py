"""A convolutional classifier of the attributes of pictures, and a feature network.

`modes.reference` trains it, and `sample_scores` predicts the attributes of samples with it. Its
features separate pictures that a classifier of a few styles confuses. Value 0 of an attribute means
"not named". The file also holds the accuracy on held-out pictures.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import Array

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import fit
from madformer_jax.evaluation.networks.network import Network, TrainingSet

Params = Mapping[str, Any]

IMAGE_SIZE = 64
# Channels and stride of each convolution. The first keeps the resolution because mouths and
# patterns are small.
LAYERS = ((24, 1), (48, 2), (48, 1), (96, 2), (96, 1), (128, 2), (128, 1), (128, 2))
FEATURE_DIM = 256
STEPS, BATCH, LEARNING_RATE = 4000, 64, 2e-3
MAX_SHIFT = 3  # augmentation of training pictures, in pixels


class AttributeClassifier(NamedTuple):
    """A trained attribute classifier and its metadata. The fields are written to its file."""

    params: Params
    values: list[int]  # number of values of each attribute
    accuracy: float  # fraction of correct predictions of named attributes, held-out pictures
    held_out: int  # number of held-out pictures


class ConvNet(nn.Module):
    """Convolutional network with one hidden feature layer.

    It maps pictures uint8 (B, IMAGE_SIZE, IMAGE_SIZE, 3) to features (B, FEATURE_DIM) and to the
    concatenated logits of all attributes, (B, sum of values).
    """

    total: int  # sum of values

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for i, (width, stride) in enumerate(LAYERS):
            x = nn.Conv(width, (3, 3), stride, precision="highest", name=f"conv{i}")(x)
            x = nn.gelu(nn.GroupNorm(8, name=f"norm{i}")(x))
        x = nn.Dense(FEATURE_DIM, precision="highest", name="features")(x.reshape(len(x), -1))
        return x, nn.Dense(self.total, precision="highest", name="values")(nn.gelu(x))


def _init(values: Sequence[int], key: Array) -> Params:
    return ConvNet(sum(values)).init(key, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8))["params"]


def _logits(params: Params, images: Array, values: Sequence[int]) -> list[Array]:
    """Returns the logits of each attribute, (B, its values)."""
    logits = ConvNet(sum(values)).apply({"params": params}, images)[1]
    return jnp.split(logits, np.cumsum(values)[:-1], axis=1)


@functools.partial(jax.jit, static_argnames="values")
def _predict(params: Params, images: Array, values: tuple[int, ...]) -> Array:
    return jnp.stack(
        [logits.argmax(axis=1) for logits in _logits(params, fit.resize(images, (IMAGE_SIZE,)), values)], axis=1
    )


def extract_features(params: Params, images: Array, values: Sequence[int]) -> Array:
    """Computes normalized features (B, FEATURE_DIM) of pictures uint8 (B, H, W, 3) of any size.

    Each picture's features have mean 0 and variance 1.
    """
    features, _ = ConvNet(sum(values)).apply({"params": params}, fit.resize(images, (IMAGE_SIZE,)))
    features -= features.mean(axis=1, keepdims=True)
    return features / jnp.sqrt(jnp.mean(features**2, axis=1, keepdims=True) + 1e-6)


def predict(classifier: AttributeClassifier, images: np.ndarray) -> np.ndarray:
    """Returns the attributes int32 (n, A) of pictures uint8 (n, H, W, 3) of any size."""
    predicted = []
    for first in range(0, len(images), BATCH):
        rows = np.arange(first, first + BATCH).clip(max=len(images) - 1)  # one compiled shape
        values = _predict(classifier.params, images[rows], tuple(classifier.values))
        predicted.append(np.asarray(values)[: len(images) - first])
    return np.concatenate(predicted) if predicted else np.zeros((0, len(classifier.values)), np.int32)


def count_matches(requested: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts the requested attributes of each picture that were predicted.

    Args:
      requested: Attribute values (n, A). 0 requests nothing.
      predicted: Attribute values (n, A) that `predict` returned.

    Returns:
      The number of matching attributes and the number of requested attributes, each (n,).
    """
    return ((requested == predicted) & (requested > 0)).sum(axis=1), (requested > 0).sum(axis=1)


def train(
    images: np.ndarray,
    attributes: np.ndarray,
    held_out_images: np.ndarray,
    held_out_attributes: np.ndarray,
    values: Sequence[int],
    steps: int = STEPS,
) -> AttributeClassifier:
    """Trains an attribute classifier. The result is deterministic on one machine.

    Args:
      images: Training pictures uint8 (n, IMAGE_SIZE, IMAGE_SIZE, 3), from `fit.resize`.
      attributes: Their attributes int32 (n, A).
      held_out_images: Held-out pictures, to measure the accuracy.
      values: Number of values of each attribute.

    Returns:
      The classifier with its accuracy on the held-out pictures.

    Raises:
      ConfigError: There are no training pictures or no held-out pictures.
    """
    if not len(images) or not len(held_out_images):
        raise ConfigError("the attribute classifier needs pictures to learn from, and others to measure its accuracy.")

    def loss(params: Params, batch: Array, rows: Array) -> Array:
        logits = _logits(params, batch, values)
        errors = [optax.softmax_cross_entropy_with_integer_labels(x, rows[:, i]) for i, x in enumerate(logits)]
        return sum(map(jnp.mean, errors), jnp.zeros(()))

    def batch(rows: np.ndarray, step: int, random: np.random.Generator) -> tuple[Any, ...]:
        shifts = random.integers(-MAX_SHIFT, MAX_SHIFT + 1, (len(rows), 2))
        shifted = [np.roll(image, shift, axis=(0, 1)) for image, shift in zip(images[rows], shifts)]
        return np.stack(shifted), attributes[rows]

    params = fit.fit(
        jax.jit(functools.partial(_init, values))(jax.random.key(0)), loss, batch, len(images),
        size=BATCH, steps=steps, rate=LEARNING_RATE, name="attribute classifier",
    )  # fmt: skip
    classifier = AttributeClassifier(params, list(values), 0.0, len(held_out_images))
    matching, named = count_matches(held_out_attributes, predict(classifier, held_out_images))
    return classifier._replace(accuracy=float(matching.sum() / max(1, named.sum())))


save = fit.save


def load(path: str) -> AttributeClassifier:
    """Reads the attribute classifier that `save` wrote.

    Raises:
      ConfigError: The file is missing or damaged.
    """
    description = "attribute classifier of --mode=reference: it does not say its attributes"
    return fit.load(
        path, AttributeClassifier, description, lambda metadata: _init(metadata["values"], jax.random.key(0))
    )


class AttributeNetwork(Network):
    """Feature network `attributes`."""

    name, weights_file, learns = "attributes", "attributes.npz", "attributes"
    input_sizes, feature_layer, feature_dim, channels = (IMAGE_SIZE,), "features", FEATURE_DIM, (3,)

    @classmethod
    def open(cls, path: str) -> "AttributeNetwork":
        return cls(load(path))

    def __init__(self, trained: AttributeClassifier):
        self.params, self._values = trained.params, trained.values
        self.metadata = {
            "attributes": len(trained.values), "accuracy": trained.accuracy, "held_out": trained.held_out,
        }  # fmt: skip

    def apply(self, params: Any, images: Array) -> tuple[Array, None]:
        return extract_features(params, images, self._values), None

    @classmethod
    def train(cls, path: str, training: TrainingSet, held_out: TrainingSet) -> None:
        trained = train(training.images, training.targets, held_out.images, held_out.targets, training.values)
        save(path, trained)
        logging.info(
            "the attribute classifier is right on %.2f %% of the attributes that the captions of %d held-out pictures name: %s",
            100 * trained.accuracy, trained.held_out, path,
        )  # fmt: skip
