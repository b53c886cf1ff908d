"""The block U-Net: every latent block on its own into tokens and back (MADFormer, section 3.1).

The layout of `diffusers` blocks: ResNet blocks with a time embedding, self-attention in the deeper stage, a strided
convolution between stages going down and nearest-neighbour upsampling with a convolution going up. NHWC throughout.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.models.attention import attend
from madformer_jax.models.transformer import rows_dot, silu

NORM_EPS = 1e-6


def conv(name: str, features: int, size: int, dtype: Any, stride: int = 1) -> nn.Conv:
    """A size x size convolution, padded by (size - 1) / 2 on both sides (PyTorch's, also when strided)."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (None, None, "conv_in", "conv_out")
        ),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )


def linear(
    name: str, features: int, axes: tuple[str, str], dtype: Any, bias: bool = True, stddev: float | None = None
) -> nn.Dense:
    init = nn.initializers.xavier_uniform() if stddev is None else nn.initializers.normal(stddev)
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        dot_general=rows_dot,
        name=name,
    )


def group_norm(name: str, groups: int, dtype: Any) -> nn.GroupNorm:
    return nn.GroupNorm(
        groups,
        epsilon=NORM_EPS,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class TimeEmbedding(nn.Module):
    """Timestep 0..999 (n,) -> (n, width): Linear, SiLU, Linear without bias, of the raw number or of sinusoids of it."""

    width: int
    kind: str  # raw (release) | sinusoidal
    dtype: Any

    @nn.compact
    def __call__(self, t: Array) -> Array:
        if self.kind == "raw":
            x = t[:, None].astype(jnp.float32)
        else:
            frequencies = jnp.exp(-math.log(10_000) * jnp.arange(self.width // 2) / (self.width // 2))
            angles = t[:, None] * frequencies
            x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        # in float32: bfloat16 does not tell neighbouring raw timesteps apart
        stddev = 0.02 if self.kind == "raw" else None
        x = linear("linear_1", self.width, ("time_in", "time"), jnp.float32, bias=False, stddev=stddev)(x)
        x = linear("linear_2", self.width, ("time_in", "time"), jnp.float32, bias=False, stddev=stddev)(nn.silu(x))
        return x.astype(self.dtype)


class ResNetBlock(nn.Module):
    """GroupNorm, SiLU, conv, + Linear(SiLU(time)), GroupNorm, SiLU, conv, + shortcut."""

    channels: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, time: Array) -> Array:
        h = conv("conv1", self.channels, 3, self.dtype)(silu(group_norm("norm1", self.groups, self.dtype)(x)))
        h = h + linear("time", self.channels, ("time", "conv_out"), self.dtype)(nn.silu(time))[:, None, None]
        h = conv("conv2", self.channels, 3, self.dtype)(silu(group_norm("norm2", self.groups, self.dtype)(h)))
        if x.shape[-1] != self.channels:
            x = conv("shortcut", self.channels, 1, self.dtype)(x)
        return x + h


class AttentionBlock(nn.Module):
    """GroupNorm, self-attention over the block's positions, residual."""

    groups: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        y = group_norm("norm", self.groups, self.dtype)(x)
        q, k, v = (
            linear(name, channels, ("conv_in", "conv_out"), self.dtype)(y).reshape(n, height * width, self.heads, -1)
            for name in ("query", "key", "value")
        )
        return x + linear("out", channels, ("conv_in", "conv_out"), self.dtype)(attend(q, k, v).reshape(x.shape))


class Downsampler(nn.Module):
    """Latent blocks (n, p, p, C) and timesteps (n,) -> tokens (n, p', p', d) and the skip states."""

    width: int
    channels: Sequence[int]
    layers: int
    attention: Sequence[bool]
    groups: int
    heads: int
    time_width: int
    time_embedding: str
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, z: Array, t: Array) -> tuple[Array, list[Array]]:
        time = TimeEmbedding(self.time_width, self.time_embedding, self.dtype, name="time")(t)
        x = conv("conv_in", self.channels[0], 3, self.dtype)(z.astype(self.dtype))
        skips = [x]
        for stage, channels in enumerate(self.channels):
            for i in range(self.layers):
                x = ResNetBlock(channels, self.groups, self.dtype, name=f"resnet_{stage}_{i}")(x, time)
                if self.attention[stage]:
                    x = AttentionBlock(self.groups, self.heads, self.dtype, name=f"attention_{stage}_{i}")(x)
                skips.append(x)
            if stage + 1 < len(self.channels):
                x = conv(f"down_{stage}", channels, 3, self.dtype, self.stride)(x)
                skips.append(x)
        return conv("conv_out", self.width, 3, self.dtype)(x), skips


class Upsampler(nn.Module):
    """Tokens (n, p', p', d), timesteps (n,) and the skip states of `Downsampler` -> latent blocks (n, p, p, C)."""

    out_channels: int
    channels: Sequence[int]  # as in Downsampler: the stages are run in reverse
    layers: int
    attention: Sequence[bool]
    groups: int
    heads: int
    time_width: int
    time_embedding: str
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, t: Array, skips: Sequence[Array]) -> Array:
        time = TimeEmbedding(self.time_width, self.time_embedding, self.dtype, name="time")(t)
        skips = list(skips)
        x = conv("conv_in", self.channels[-1], 3, self.dtype)(h)
        stages = len(self.channels)
        for stage in range(stages):
            channels, attention = self.channels[stages - 1 - stage], self.attention[stages - 1 - stage]
            for i in range(self.layers + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = ResNetBlock(channels, self.groups, self.dtype, name=f"resnet_{stage}_{i}")(x, time)
                if attention:
                    x = AttentionBlock(self.groups, self.heads, self.dtype, name=f"attention_{stage}_{i}")(x)
            if stage + 1 < stages:
                n, height, width, _ = x.shape
                x = jax.image.resize(x, (n, self.stride * height, self.stride * width, channels), "nearest")
                x = conv(f"up_{stage}", channels, 3, self.dtype)(x)
        return conv("conv_out", self.out_channels, 3, self.dtype)(x).astype(jnp.float32)
