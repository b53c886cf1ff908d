"""A small convolutional classifier: features of images, and their classes, where there are no Inception weights.

`train` makes one in a minute or two from the labelled images themselves, always the same one from the same images; the layer
before the last gives the features. What it is worth is its accuracy on images that it has not seen, kept with it.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import fit

Array = jax.Array
Params = Mapping[str, Any]

IMAGE_SIZES = (32, 64)  # images are resized to the smaller one if they are no larger, else to the larger one
WIDTHS = (32, 64, 128)  # channels at 16 x 16, 8 x 8, 4 x 4
FEATURE_DIM = 64  # features
STEPS, BATCH, LEARNING_RATE = 2000, 64, 2e-3
MAX_ROTATION, MAX_SCALING, MAX_SHIFT = (
    0.15,
    0.1,
    0.07,
)  # at most, of training images: radians, relative, share of the side


class Classifier(NamedTuple):
    """A trained classifier with what it knows of itself."""

    params: Params
    classes: int
    channels: int  # of the images, 1 or 3
    accuracy: float  # on held-out images
    held_out: int  # number of those


class Network(nn.Module):
    """Images (B, s, s, c), uint8, s one of `SIDES`, to (features (B, DIMS), logits (B, classes)), float32."""

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
        # of one length: otherwise a few images that the network is sure of decide a distance
        features = nn.LayerNorm(use_bias=False, use_scale=False, name="norm")(x)
        return features, nn.Dense(self.classes, precision="highest", name="classes")(nn.gelu(features))


@functools.partial(jax.jit, static_argnames=("classes", "channels"))
def init(key: Array, classes: int, channels: int) -> Params:
    """Untrained parameters."""
    return Network(classes).init(key, jnp.zeros((1, IMAGE_SIZES[0], IMAGE_SIZES[0], channels), jnp.uint8))["params"]


@functools.partial(jax.jit, static_argnames="classes")
def apply(params: Params, images: Array, classes: int) -> tuple[Array, Array]:
    """(Features (B, DIMS), logits (B, classes)) of uint8 images (B, H, W, c) of any size."""
    return Network(classes).apply({"params": params}, _resize(images))


@jax.jit
def _resize(images: Array) -> Array:
    """Images (B, H, W, c) at one of `SIDES`: bilinear, antialiased, rounded to uint8."""
    side = IMAGE_SIZES[0] if max(images.shape[1:3]) <= IMAGE_SIZES[0] else IMAGE_SIZES[1]
    return fit.resize(images, side)


def downscale(images: np.ndarray) -> np.ndarray:
    """Images uint8 (B, H, W, c) at the size that the network sees, to be collected for `train` batch by batch."""
    return np.asarray(_resize(images))


def train(
    images: np.ndarray,
    labels: np.ndarray,
    held_images: np.ndarray,
    held_labels: np.ndarray,
    steps: int = STEPS,
    seed: int = 0,
) -> Classifier:
    """Trains a classifier; the same arrays, steps and seed give the same one on the same machine.

    Args:
      images, labels: uint8 (n, H, W, 1 or 3), best through `shrunk`, and their classes (n,) from 0.
      held_images, held_labels: others of the same kind, to measure the accuracy.

    Raises:
      ConfigError: less than two classes: nothing to learn; or no held-out image.
    """
    classes = int(labels.max(initial=-1)) + 1
    if len(np.unique(labels)) < 2:
        raise ConfigError("the classifier needs labelled images of two classes or more: these have no labels.")
    if not len(held_images):
        raise ConfigError("the classifier needs held-out images to measure its accuracy: there are none.")
    data, targets = downscale(images), np.asarray(labels)
    key = jax.random.key(seed)

    def loss(params: Params, batch: Array, targets: Array, key: Array) -> Array:
        logits = Network(classes).apply({"params": params}, _augment(batch, key))[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def batch(rows: np.ndarray, step: int, random: np.random.Generator) -> tuple[Any, ...]:
        return data[rows], targets[rows], jax.random.fold_in(key, step)

    params = fit.fit(
        init(key, classes, images.shape[-1]), loss, batch, len(data),
        size=BATCH, steps=steps, rate=LEARNING_RATE, seed=seed, name="classifier",
    )  # fmt: skip
    right = [
        _count_correct(params, held_images[i : i + 256], held_labels[i : i + 256], classes)
        for i in range(0, len(held_images), 256)
    ]
    return Classifier(params, classes, images.shape[-1], float(np.concatenate(right).mean()), len(held_images))


def _count_correct(params: Params, images: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    return np.asarray(apply(params, images, classes)[1]).argmax(axis=1) == labels


def _augment(images: Array, key: Array) -> Array:
    """Images (B, s, s, c), float32 of 0..255, each turned, scaled and shifted a little; borders are repeated."""
    n, side = images.shape[0], images.shape[1]
    angle, scale, *shift = jnp.split(jax.random.uniform(key, (n, 4), jnp.float32, minval=-1, maxval=1), 4, axis=1)
    angle, scale = angle[:, 0] * MAX_ROTATION, 1 + scale[:, 0] * MAX_SCALING
    matrix = jnp.stack([jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle)], axis=1).reshape(n, 2, 2)
    centre = (side - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(side, dtype=jnp.float32)] * 2, indexing="ij")) - centre
    at = jnp.einsum("nij,jhw->nihw", matrix * scale[:, None, None], grid, precision="highest")
    at = at + (jnp.concatenate(shift, axis=1) * MAX_SHIFT * side)[:, :, None, None] + centre

    def read(image: Array, at: Array) -> Array:  # (s, s), (2, s, s)
        return jax.scipy.ndimage.map_coordinates(image, list(at), order=1, mode="nearest")

    return jax.vmap(jax.vmap(read, in_axes=(-1, None), out_axes=-1))(images.astype(jnp.float32), at)


def save(path: str, classifier: Classifier) -> None:
    """Writes a classifier to a file (`files.SUFFIXES`)."""
    fit.save(path, classifier)


def load(path: str) -> Classifier:
    """The classifier that `save` wrote.

    Raises:
      ConfigError: there is none at `path`, or it is damaged.
    """
    what = "classifier of --mode=reference: it does not say its classes"
    return fit.load(path, Classifier, what, lambda about: init(jax.random.key(0), about["classes"], about["channels"]))
