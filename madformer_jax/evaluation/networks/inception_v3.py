"""Inception-v3 for the Frechet distance, the TensorFlow network of pytorch-fid and torch-fidelity.

It differs from torchvision's network in three points. Average pools exclude the padding, Mixed_7c
uses a max pool, and the classifier has 1008 classes. The path of a parameter is its name in the
PyTorch checkpoints. `inception.Inception` opens it for the scores.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]

IMAGE_SIZE = 299
EPS = 1e-3  # of the batch normalizations
PRECISION = "highest"  # The default precision of TPUs would change the scores.


class Features(NamedTuple):
    """Spatial means at five depths and the class scores, each (B, channels), float32."""

    f64: Array
    f192: Array
    f768: Array
    f2048: Array  # the features of FID
    logits_unbiased: Array  # without the bias of the last layer, for the inception score
    logits: Array


class Conv(nn.Module):
    """Convolution without bias, batch normalization with stored statistics, and ReLU."""

    channels: int
    size: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = [(p, p) for p in self.padding]
        conv = nn.Conv(self.channels, self.size, self.stride, padding, use_bias=False, precision=PRECISION, name="conv")
        return nn.relu(BatchNorm(name="bn")(conv(x)))


class BatchNorm(nn.Module):
    """Batch normalization with stored mean and variance, with the parameter names of PyTorch."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def param(name: str, init: nn.initializers.Initializer) -> Array:
            return self.param(name, init, x.shape[-1:], jnp.float32)

        scale = param("weight", nn.initializers.ones) / jnp.sqrt(param("running_var", nn.initializers.ones) + EPS)
        mean = param("running_mean", nn.initializers.zeros)
        return (x - mean) * scale + param("bias", nn.initializers.zeros)


def _average_pool(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)


def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _square_conv(channels: int, name: str, size: int = 1, padding: int = 0, stride: int = 1) -> Conv:
    return Conv(channels, (size, size), stride, (padding, padding), name=name)


class MixedA(nn.Module):
    """Mixed_5b to Mixed_5d, at 35 x 35."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        five = _square_conv(64, "branch5x5_2", 5, 2)(_square_conv(48, "branch5x5_1")(x))
        three = _square_conv(96, "branch3x3dbl_2", 3, 1)(_square_conv(64, "branch3x3dbl_1")(x))
        three = _square_conv(96, "branch3x3dbl_3", 3, 1)(three)
        pool = _square_conv(self.pool_channels, "branch_pool")(_average_pool(x))
        return jnp.concatenate([_square_conv(64, "branch1x1")(x), five, three, pool], axis=-1)


class MixedB(nn.Module):
    """Mixed_6a, from 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = _square_conv(384, "branch3x3", 3, stride=2)(x)
        double = _square_conv(96, "branch3x3dbl_2", 3, 1)(_square_conv(64, "branch3x3dbl_1")(x))
        double = _square_conv(96, "branch3x3dbl_3", 3, stride=2)(double)
        return jnp.concatenate([three, double, _max_pool(x)], axis=-1)


class MixedC(nn.Module):
    """Mixed_6b to Mixed_6e, at 17 x 17, with 7 x 7 convolutions as pairs of 1 x 7 and 7 x 1."""

    channels: int  # of the inner convolutions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def row(channels: int, name: str) -> Conv:
            return Conv(channels, (1, 7), padding=(0, 3), name=name)

        def column(channels: int, name: str) -> Conv:
            return Conv(channels, (7, 1), padding=(3, 0), name=name)

        c = self.channels
        seven = row(c, "branch7x7_2")(_square_conv(c, "branch7x7_1")(x))
        seven = column(192, "branch7x7_3")(seven)
        double = column(c, "branch7x7dbl_2")(_square_conv(c, "branch7x7dbl_1")(x))
        double = column(c, "branch7x7dbl_4")(row(c, "branch7x7dbl_3")(double))
        double = row(192, "branch7x7dbl_5")(double)
        pool = _square_conv(192, "branch_pool")(_average_pool(x))
        return jnp.concatenate([_square_conv(192, "branch1x1")(x), seven, double, pool], axis=-1)


class MixedD(nn.Module):
    """Mixed_7a, from 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = _square_conv(320, "branch3x3_2", 3, stride=2)(_square_conv(192, "branch3x3_1")(x))
        seven = Conv(192, (1, 7), padding=(0, 3), name="branch7x7x3_2")(_square_conv(192, "branch7x7x3_1")(x))
        seven = Conv(192, (7, 1), padding=(3, 0), name="branch7x7x3_3")(seven)
        seven = _square_conv(192, "branch7x7x3_4", 3, stride=2)(seven)
        return jnp.concatenate([three, seven, _max_pool(x)], axis=-1)


class MixedE(nn.Module):
    """Mixed_7b and Mixed_7c, at 8 x 8."""

    max_pool: bool  # True for Mixed_7c, as in the TensorFlow network; otherwise an average pool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def split(x: Array, name: str) -> list[Array]:
            row = Conv(384, (1, 3), padding=(0, 1), name=f"{name}a")
            column = Conv(384, (3, 1), padding=(1, 0), name=f"{name}b")
            return [row(x), column(x)]

        three = split(_square_conv(384, "branch3x3_1")(x), "branch3x3_2")
        double = _square_conv(384, "branch3x3dbl_2", 3, 1)(_square_conv(448, "branch3x3dbl_1")(x))
        double = split(double, "branch3x3dbl_3")
        pooled = nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1))) if self.max_pool else _average_pool(x)
        pool = _square_conv(192, "branch_pool")(pooled)
        return jnp.concatenate([_square_conv(320, "branch1x1")(x), *three, *double, pool], axis=-1)


class InceptionV3(nn.Module):
    """Maps images (B, H, W, 3) with values 0..255, uint8 or float, to `Features`."""

    @nn.compact
    def __call__(self, images: Array) -> Features:
        def mean(x: Array) -> Array:
            return x.mean(axis=(1, 2))

        x = (resize(images.astype(jnp.float32), IMAGE_SIZE) - 128) / 128
        x = _square_conv(32, "Conv2d_1a_3x3", 3, stride=2)(x)
        x = _square_conv(64, "Conv2d_2b_3x3", 3, 1)(_square_conv(32, "Conv2d_2a_3x3", 3)(x))
        x = _max_pool(x)
        f64 = mean(x)
        x = _max_pool(_square_conv(192, "Conv2d_4a_3x3", 3)(_square_conv(80, "Conv2d_3b_1x1")(x)))
        f192 = mean(x)
        for name, pool_channels in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = MixedA(pool_channels, name=name)(x)
        x = MixedB(name="Mixed_6a")(x)
        for name, channels in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = MixedC(channels, name=name)(x)
        f768 = mean(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(max_pool=False, name="Mixed_7b")(x)
        f2048 = mean(MixedE(max_pool=True, name="Mixed_7c")(x))
        unbiased, logits = Classifier(name="fc")(f2048)
        return Features(f64, f192, f768, f2048, unbiased, logits)


class Classifier(nn.Module):
    """Logits of the 1008 classes, without and with the bias."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        classes = 1008
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], classes), jnp.float32)
        unbiased = jnp.matmul(x, kernel, precision=PRECISION)
        return unbiased, unbiased + self.param("bias", nn.initializers.zeros, (classes,), jnp.float32)


def resize(images: Array, side: int) -> Array:
    """Resizes (B, H, W, c) bilinearly like TensorFlow 1: no half-pixel centers, no antialiasing.

    Scores depend on it. torch-fidelity does the same; pytorch-fid uses half-pixel centers.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        position = np.arange(side, dtype=np.float32) * np.float32(length / side)
        low = np.minimum(position.astype(np.int32), length - 1)
        high = np.minimum(low + 1, length - 1)
        fraction = (position - low).reshape([-1 if i == axis else 1 for i in range(4)])
        below = images.take(low, axis)
        images = below + (images.take(high, axis) - below) * fraction
    return images


def features(params: Params, images: Array) -> Features:
    """Computes `Features` of images (B, H, W, 3) with values 0..255."""
    return InceptionV3().apply({"params": params}, images)
