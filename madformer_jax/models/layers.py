"""What the networks are made of: linear layers, convolutions, norms, SiLU, the ResNet block, with their logical axes."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax import Array

GROUP_NORM_EPS = 1e-6  # of the block U-Net (MADFormer, section 3.1) and the VAE
XAVIER = nn.initializers.xavier_uniform()


def rows_dot(x: Array, kernel: Array, dimension_numbers: Any, **settings: Any) -> Array:
    """X (..., d) times a matrix, as one product of matrices: with more axes to sum over, XLA on CPU copies the operands of the
    kernel's gradient into another order first.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **settings).reshape(*x.shape[:-1], -1)


@jax.checkpoint
def silu(x: Array) -> Array:
    """SiLU, x sigmoid(x); its gradient takes the sigmoid again, which costs less than to keep it."""
    return nn.silu(x)


def dense(
    features: int,
    axes: tuple[str, str],
    dtype: Any,
    *,
    bias: bool = True,
    init: nn.initializers.Initializer = XAVIER,
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
        dot_general=rows_dot,
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
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2 if padding is None else padding,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (None, None, "conv_in", "conv_out")
        ),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )


def rms_norm(eps: float, dtype: Any) -> nn.RMSNorm:
    scale = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return nn.RMSNorm(epsilon=eps, dtype=dtype, scale_init=scale)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """With the variance in two passes, which loses nothing where the mean is large."""
    return nn.GroupNorm(
        groups,
        epsilon=GROUP_NORM_EPS,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class ResNetBlock(nn.Module):
    """GroupNorm, SiLU, conv, + Linear(SiLU(time)) where there is a time, GroupNorm, SiLU, conv, + shortcut."""

    channels: int
    groups: int
    dtype: Any
    shortcut: str = "shortcut"  # name of its 1 x 1 convolution, where the channels differ

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        h = conv(self.channels, 3, self.dtype, name="conv1")(silu(group_norm(self.groups, self.dtype, "norm1")(x)))
        if time is not None:
            h = h + dense(self.channels, ("time", "conv_out"), self.dtype, name="time")(nn.silu(time))[:, None, None]
        h = conv(self.channels, 3, self.dtype, name="conv2")(silu(group_norm(self.groups, self.dtype, "norm2")(h)))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, name=self.shortcut)(x)
        return x + h
