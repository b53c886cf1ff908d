"""What the networks are made of: linear layers, convolutions, norms, SiLU, the ResNet block, with their logical axes."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax import Array

GROUP_NORM_EPS = 1e-6  # of the block U-Net (MADFormer, section 3.1) and the VAE


def _uniform_init(scale: float, mode: Literal["fan_in", "fan_avg"]) -> nn.initializers.Initializer:
    """Uniform weights of variance scale / fan, traced once for each shape: Flax asks for it whenever it reads a parameter."""
    return jax.jit(nn.initializers.variance_scaling(scale, mode, "uniform"), static_argnums=(1, 2))


XAVIER_INIT = _uniform_init(1, "fan_avg")
XAVIER_QKV_INIT = _uniform_init(1 / 2, "fan_in")  # for d -> d, as a third of one matrix d -> 3 d
_CONV_INIT = _uniform_init(1 / 3, "fan_in")  # PyTorch's
NORM_SCALE_INIT = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))


def all_gather_kernel(kernel: Array, axes: Sequence[str | None]) -> Array:
    """A kernel, already of the type it is multiplied in, as a product takes it: whole but for what is split over "tensor".

    Left alone, the partitioner of a TPU does not gather a kernel that is split along the axis that is summed over: it makes a
    loop of thin products of each, four times as slow (docs/performance.md). Its gradient is summed and split again.
    """
    used = {"embed": None, "conv_out": "conv_used"}
    return nn.with_logical_constraint(kernel, tuple(used.get(axis or "", axis) for axis in axes))


def flattened_dot_general(
    x: Array, kernel: Array, dimension_numbers: Any, *, axes: tuple[str, str], **settings: Any
) -> Array:
    """X (..., d) times a matrix, as one product of matrices: with more axes to sum over, XLA on CPU copies the operands of the
    kernel's gradient into another order first.
    """
    kernel = all_gather_kernel(kernel, axes)
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **settings).reshape(*x.shape[:-1], -1)


@jax.checkpoint
def silu(x: Array) -> Array:
    """SiLU, x sigmoid(x); its gradient takes the sigmoid again, which costs less than to keep it."""
    return nn.silu(x)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """SwiGLU's silu(gate) up. Its gradients are written once, where they arise: a TPU's compiler takes them anew in each of the four
    products that read them.
    """
    return nn.silu(gate) * up


def _swiglu_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, pull = jax.vjp(lambda gate, up: nn.silu(gate) * up, *saved)
    return jax.lax.optimization_barrier(pull(gradient))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def dense(
    features: int,
    axes: tuple[str, str],
    dtype: Any,
    *,
    bias: bool = True,
    init: nn.initializers.Initializer = XAVIER_INIT,
    precision: Any = None,
    name: str | None = None,
) -> nn.Dense:
    """A linear layer, by default with Xavier's weights, and zero bias; `axes` are its logical axes."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        dot_general=functools.partial(flattened_dot_general, axes=axes),
        name=name,
    )


def conv(
    features: int,
    size: int,
    dtype: Any,
    *,
    stride: int = 1,
    padding: int | Sequence[tuple[int, int]] | None = None,
    precision: Any = None,
    name: str | None = None,
) -> nn.Conv:
    """A size x size convolution, by default padded by (size - 1) / 2 on both sides (PyTorch's, also when strided)."""
    axes = (None, None, "conv_in", "conv_out")

    def convolve(x: Array, kernel: Array, *args: Any, **settings: Any) -> Array:
        kernel = all_gather_kernel(kernel, axes)
        if x.shape[1:3] == (2, 2) and (size, stride, padding) == (3, 1, None):
            return _convolve_2x2(x, kernel, settings["precision"])
        return jax.lax.conv_general_dilated(x, kernel, *args, **settings)

    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2 if padding is None else padding,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(_CONV_INIT, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        conv_general_dilated=convolve,
        name=name,
    )


def _convolve_2x2(x: Array, kernel: Array, precision: Any) -> Array:
    """A padded 3 x 3 convolution of 2 x 2 positions, (n, 2, 2, c) -> (n, 2, 2, f), as one product of matrices.

    Each position sees all four. XLA on CPU takes ten times as long for the convolution.
    """
    n, _, _, channels = x.shape
    step = np.array([[1, 0], [2, 1]])  # [from, to] -> place in the kernel
    matrix = kernel[step[:, None, :, None], step[None, :, None, :]]  # (from y, from x, to y, to x, c, f)
    matrix = matrix.transpose(0, 1, 4, 2, 3, 5).reshape(4 * channels, -1)
    return jax.lax.dot(x.reshape(n, 4 * channels), matrix, precision=precision).reshape(n, 2, 2, -1)


def rms_norm(eps: float, dtype: Any) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=eps, dtype=dtype, scale_init=NORM_SCALE_INIT)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """With the variance in two passes, which loses nothing where the mean is large."""
    return nn.GroupNorm(
        groups,
        epsilon=GROUP_NORM_EPS,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=NORM_SCALE_INIT,
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class ResNetBlock(nn.Module):
    """GroupNorm, SiLU, conv, + Linear(SiLU(time)) where there is a time, GroupNorm, SiLU, conv, + shortcut."""

    channels: int
    groups: int
    dtype: Any
    kernel: int = 3
    shortcut: str = "shortcut"  # name of its 1 x 1 convolution, where the channels differ

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        convolution = functools.partial(conv, self.channels, self.kernel, self.dtype)
        h = convolution(name="conv1")(silu(group_norm(self.groups, self.dtype, "norm1")(x)))
        if time is not None:
            h = h + dense(self.channels, ("time", "conv_out"), self.dtype, name="time")(nn.silu(time))[:, None, None]
        h = convolution(name="conv2")(silu(group_norm(self.groups, self.dtype, "norm2")(h)))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, name=self.shortcut)(x)
        return x + h
