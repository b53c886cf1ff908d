"""A small convolutional classifier of a data set's images, for scores without Inception weights.

`modes.reference` trains it on the labeled images, which takes one or two minutes. The layer before
the last gives the features. The file also holds the accuracy on held-out images.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import fit
from madformer_jax.evaluation.networks.network import Network, TrainingSet

Array = jax.Array
Params = Mapping[str, Any]

IMAGE_SIZES = (32, 64)  # input sizes: 32 for images up to 32 x 32, otherwise 64
WIDTHS = (32, 64, 128)  # channels at 16 x 16, 8 x 8, 4 x 4
FEATURE_DIM = 64
STEPS, BATCH, LEARNING_RATE = 2000, 64, 2e-3
# Augmentation of training images: radians, relative size, fraction of the side.
MAX_ROTATION, MAX_SCALING, MAX_SHIFT = 0.15, 0.1, 0.07


class Classifier(NamedTuple):
    """A trained classifier and its metadata. The fields are written to its file."""

    params: Params
    classes: int
    channels: int  # of the images, 1 or 3
    accuracy: float  # on held-out images
    held_out: int  # number of held-out images


class ConvNet(nn.Module):
    """Convolutional network with one hidden feature layer.

    It maps images uint8 (B, s, s, c), with s in `IMAGE_SIZES`, to features (B, FEATURE_DIM) and
    logits (B, classes), both float32.
    """

    classes: int

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for i, width in enumerate(WIDTHS):
            stride = 2 if i else images.shape[1] // 16
            x = nn.Conv(width, (3, 3), stride, precision="highest", name=f"conv{i}")(x)
            x = nn.gelu(nn.GroupNorm(8, name=f"norm{i}")(x))
        x = x.reshape(len(x), -1)
        x = nn.Dense(FEATURE_DIM, precision="highest", name="features")(x)
        # Without normalization a few confidently classified images would dominate the distances.
        features = nn.LayerNorm(use_bias=False, use_scale=False, name="norm")(x)
        return features, nn.Dense(self.classes, precision="highest", name="classes")(nn.gelu(features))


@functools.partial(jax.jit, static_argnames=("classes", "channels"))
def init(key: Array, classes: int, channels: int) -> Params:
    """Returns untrained parameters."""
    return ConvNet(classes).init(key, jnp.zeros((1, IMAGE_SIZES[0], IMAGE_SIZES[0], channels), jnp.uint8))["params"]


@functools.partial(jax.jit, static_argnames="classes")
def apply(params: Params, images: Array, classes: int) -> tuple[Array, Array]:
    """Computes features (B, FEATURE_DIM) and logits (B, classes) of images uint8 (B, H, W, c)."""
    return ConvNet(classes).apply({"params": params}, fit.resize(images, IMAGE_SIZES))


def train(
    images: np.ndarray,
    labels: np.ndarray,
    held_out_images: np.ndarray,
    held_out_labels: np.ndarray,
    steps: int = STEPS,
) -> Classifier:
    """Trains a classifier. The result is deterministic on one machine.

    Args:
      images: Training images uint8 (n, H, W, 1 or 3), preferably from `fit.resize`.
      labels: Their classes (n,), from 0.
      held_out_images: Held-out images, to measure the accuracy.

    Returns:
      The classifier with its accuracy on the held-out images.

    Raises:
      ConfigError: The images have less than two classes, or there are no held-out images.
    """
    classes = int(labels.max(initial=-1)) + 1
    if len(np.unique(labels)) < 2:
        raise ConfigError("the classifier needs labeled images of two classes or more: these have no labels.")
    if not len(held_out_images):
        raise ConfigError("the classifier needs held-out images to measure its accuracy: there are none.")
    data, targets = np.asarray(fit.resize(images, IMAGE_SIZES)), np.asarray(labels)
    key = jax.random.key(0)

    def loss(params: Params, batch: Array, targets: Array, key: Array) -> Array:
        logits = ConvNet(classes).apply({"params": params}, _augment(batch, key))[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def batch(rows: np.ndarray, step: int, random: np.random.Generator) -> tuple[Any, ...]:
        return data[rows], targets[rows], jax.random.fold_in(key, step)

    params = fit.fit(
        init(key, classes, images.shape[-1]), loss, batch, len(data),
        size=BATCH, steps=steps, rate=LEARNING_RATE, name="classifier",
    )  # fmt: skip
    correct = [
        _is_correct(params, held_out_images[i : i + 256], held_out_labels[i : i + 256], classes)
        for i in range(0, len(held_out_images), 256)
    ]
    return Classifier(params, classes, images.shape[-1], float(np.concatenate(correct).mean()), len(held_out_images))


def _is_correct(params: Params, images: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    return np.asarray(apply(params, images, classes)[1]).argmax(axis=1) == labels


def _augment(images: Array, key: Array) -> Array:
    """Rotates, scales and shifts each image (B, s, s, c) at random. Returns float32 values 0..255.

    Border pixels are repeated outside the image.
    """
    n, side = images.shape[0], images.shape[1]
    angle, scale, *shift = jnp.split(jax.random.uniform(key, (n, 4), jnp.float32, minval=-1, maxval=1), 4, axis=1)
    angle, scale = angle[:, 0] * MAX_ROTATION, 1 + scale[:, 0] * MAX_SCALING
    matrix = jnp.stack([jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle)], axis=1).reshape(n, 2, 2)
    center = (side - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(side, dtype=jnp.float32)] * 2, indexing="ij")) - center
    coordinates = jnp.einsum("nij,jhw->nihw", matrix * scale[:, None, None], grid, precision="highest")
    coordinates = coordinates + (jnp.concatenate(shift, axis=1) * MAX_SHIFT * side)[:, :, None, None] + center

    def interpolate(image: Array, coordinates: Array) -> Array:  # (s, s), (2, s, s)
        return jax.scipy.ndimage.map_coordinates(image, list(coordinates), order=1, mode="nearest")

    return jax.vmap(jax.vmap(interpolate, in_axes=(-1, None), out_axes=-1))(images.astype(jnp.float32), coordinates)


save = fit.save


def load(path: str) -> Classifier:
    """Reads the classifier that `save` wrote.

    Raises:
      ConfigError: The file is missing or damaged.
    """
    return fit.load(
        path,
        Classifier,
        "classifier of --mode=reference: it does not say its classes",
        lambda metadata: init(jax.random.key(0), metadata["classes"], metadata["channels"]),
    )


class ClassifierNetwork(Network):
    """Feature network `classifier`."""

    name, weights_file, learns = "classifier", "classifier.npz", "labels"
    input_sizes, feature_layer, feature_dim = IMAGE_SIZES, "norm", FEATURE_DIM

    @classmethod
    def open(cls, path: str) -> "ClassifierNetwork":
        return cls(load(path))

    def __init__(self, trained: Classifier):
        self.params, self.channels, self._classes = trained.params, (trained.channels,), trained.classes
        self.metadata = {"classes": trained.classes, "accuracy": trained.accuracy, "held_out": trained.held_out}

    def apply(self, params: Any, images: Array) -> tuple[Array, Array]:
        return apply(params, images, self._classes)

    @classmethod
    def train(cls, path: str, training: TrainingSet, held_out: TrainingSet) -> None:
        trained = train(training.images, training.targets, held_out.images, held_out.targets)
        save(path, trained)
        logging.info(
            "the classifier is right on %.2f %% of %d held-out images: %s",
            100 * trained.accuracy, trained.held_out, path,
        )  # fmt: skip
