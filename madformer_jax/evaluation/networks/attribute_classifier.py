"""A convolutional network that reads attributes from pictures: for each of them its value, or "none".

`train` makes one from pictures whose attributes are known, always the same one from the same pictures. What it is worth is its
accuracy on pictures that it has not seen, kept with it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import fit

Params = Mapping[str, Any]

IMAGE_SIZE = 64  # of the pictures that it sees
# channels and stride of each convolution; the first sees all pixels, since a mouth or a pattern is made of a few
LAYERS = ((24, 1), (48, 2), (48, 1), (96, 2), (96, 1), (128, 2), (128, 1), (128, 2))
FEATURE_DIM = 256
STEPS, BATCH, LEARNING_RATE = 4000, 64, 2e-3
MAX_SHIFT = 3  # pixels, at most, of training pictures


class AttributeClassifier(NamedTuple):
    """A trained reader with what it knows of itself."""

    params: Params
    values: list[int]  # how many each attribute has
    accuracy: float  # share of the attributes of held-out pictures that it reads right; "none" counts for nothing
    held_out: int  # number of pictures


class Network(nn.Module):
    """Pictures (B, SIDE, SIDE, 3), uint8, to features (B, DIMS) and the logits of all attributes' values in a row, (B, sum of
    values).
    """

    total: int

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for i, (width, stride) in enumerate(LAYERS):
            x = nn.Conv(width, (3, 3), stride, precision="highest", name=f"conv{i}")(x)
            x = nn.gelu(nn.GroupNorm(8, name=f"norm{i}")(x))
        x = nn.Dense(FEATURE_DIM, precision="highest", name="features")(x.reshape(len(x), -1))
        return x, nn.Dense(self.total, precision="highest", name="values")(nn.gelu(x))


def _init(values: Sequence[int], key: Array) -> Params:
    return Network(sum(values)).init(key, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8))["params"]


def _logits(params: Params, images: Array, values: Sequence[int]) -> list[Array]:
    """Of each attribute, (B, its values)."""
    together = Network(sum(values)).apply({"params": params}, images)[1]
    return jnp.split(together, np.cumsum(values)[:-1], axis=1)


@functools.partial(jax.jit, static_argnames="values")
def _predict(params: Params, images: Array, values: tuple[int, ...]) -> Array:
    return jnp.stack(
        [logits.argmax(axis=1) for logits in _logits(params, fit.resize(images, IMAGE_SIZE), values)], axis=1
    )


def extract_features(params: Params, images: Array, values: Sequence[int]) -> Array:
    """What it goes by, (B, DIMS), of pictures uint8 (B, H, W, 3) of any size: each centred and of one length."""
    found, _ = Network(sum(values)).apply({"params": params}, fit.resize(images, IMAGE_SIZE))
    found -= found.mean(axis=1, keepdims=True)
    return found / jnp.sqrt(jnp.mean(found**2, axis=1, keepdims=True) + 1e-6)


def downscale(images: np.ndarray) -> np.ndarray:
    """Pictures uint8 (n, H, W, 3) at the size that the network sees, to be collected for `train` batch by batch."""
    return np.asarray(fit.resize(jnp.asarray(images), IMAGE_SIZE))


def predict(reader: AttributeClassifier, images: np.ndarray) -> np.ndarray:
    """The attributes (n, A) int32 of pictures uint8 (n, H, W, 3) of any size."""
    found = []
    for at in range(0, len(images), BATCH):
        rows = np.arange(at, at + BATCH).clip(max=len(images) - 1)  # one compiled shape
        found.append(np.asarray(_predict(reader.params, images[rows], tuple(reader.values)))[: len(images) - at])
    return np.concatenate(found) if found else np.zeros((0, len(reader.values)), np.int32)


def count_matches(asked: np.ndarray, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each picture, how many of the attributes (n, A) that are asked for it shows, and how many are; 0 asks for nothing."""
    return ((asked == read) & (asked > 0)).sum(axis=1), (asked > 0).sum(axis=1)


def train(
    images: np.ndarray,
    attributes: np.ndarray,
    held_images: np.ndarray,
    held_attributes: np.ndarray,
    values: Sequence[int],
    steps: int = STEPS,
    seed: int = 0,
) -> AttributeClassifier:
    """Trains a reader.

    Args:
      images, attributes: uint8 (n, SIDE, SIDE, 3), as `shrunk` gives them, and int32 (n, A).
      held_images, held_attributes: others, to measure the accuracy.
      values: how many values each attribute has.

    Raises:
      ConfigError: there are no pictures on one of the two sides.
    """
    if not len(images) or not len(held_images):
        raise ConfigError("a reader of attributes needs pictures to learn from, and others to measure its accuracy.")

    def loss(params: Params, batch: Array, rows: Array) -> Array:
        logits = _logits(params, batch, values)
        errors = [optax.softmax_cross_entropy_with_integer_labels(x, rows[:, i]) for i, x in enumerate(logits)]
        return sum(map(jnp.mean, errors), jnp.zeros(()))

    def batch(rows: np.ndarray, step: int, random: np.random.Generator) -> tuple[Any, ...]:
        shifts = random.integers(-MAX_SHIFT, MAX_SHIFT + 1, (len(rows), 2))
        shifted = [np.roll(image, shift, axis=(0, 1)) for image, shift in zip(images[rows], shifts)]
        return np.stack(shifted), attributes[rows]

    params = fit.fit(
        jax.jit(functools.partial(_init, values))(jax.random.key(seed)), loss, batch, len(images),
        size=BATCH, steps=steps, rate=LEARNING_RATE, seed=seed, name="reader of attributes",
    )  # fmt: skip
    reader = AttributeClassifier(params, list(values), 0.0, len(held_images))
    shown, asked = count_matches(held_attributes, predict(reader, held_images))
    return reader._replace(accuracy=float(shown.sum() / max(1, asked.sum())))


def save(path: str, reader: AttributeClassifier) -> None:
    """Writes a reader to a file (`files.SUFFIXES`)."""
    fit.save(path, reader)


def load(path: str) -> AttributeClassifier:
    """The reader that `save` wrote.

    Raises:
      ConfigError: there is none at `path`, or it is damaged.
    """
    what = "reader of --mode=reference: it does not say its attributes"
    return fit.load(path, AttributeClassifier, what, lambda about: _init(about["values"], jax.random.key(0)))
