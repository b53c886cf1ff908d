"""The block U-Net, which maps each latent block to tokens and back (MADFormer, section 3.1).

`madformer.MADFormer` embeds blocks with `Downsampler` and reconstructs them with `Upsampler`. Both
follow the layout of `diffusers`: ResNet blocks with a time embedding, and optional self-attention in
each stage (`attention`). Between stages a strided convolution goes down, and nearest-neighbor
upsampling with a convolution goes up. Arrays are NHWC.

Shapes: n blocks of height x width positions with C channels become token_height x token_width tokens
of width d.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Num

from madformer_jax.models.layers import XAVIER_INIT, ResNetBlock, conv, dense, group_norm
from madformer_jax.ops.attention.base import Attention


class TimeEmbedding(nn.Module):
    """Embeds timesteps, numbers from 0 to 999, by Linear, SiLU, Linear without biases.

    Timesteps enter the model only here: the decoder layers have no AdaLN (section 3.1).
    """

    width: int
    kind: str  # input of the first layer: "raw", the number itself (release), or "sinusoidal"
    dtype: DTypeLike

    @nn.compact
    def __call__(self, t: Num[Array, " n"]) -> Float[Array, "n {self.width}"]:
        if self.kind == "raw":
            x = t[:, None].astype(jnp.float32)
        else:
            frequencies = jnp.exp(-math.log(10_000) * jnp.arange(self.width // 2) / (self.width // 2))
            angles = t[:, None] * frequencies
            x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        # Highest precision, because bfloat16 products, a TPU's default, round neighboring raw
        # timesteps to one value.
        init = nn.initializers.normal(0.02) if self.kind == "raw" else XAVIER_INIT
        linear = functools.partial(
            dense, self.width, ("time_in", "time"), jnp.float32, bias=False, init=init, precision="highest"
        )
        return linear(name="linear_2")(nn.silu(linear(name="linear_1")(x))).astype(self.dtype)


class AttentionBlock(nn.Module):
    """GroupNorm and self-attention over the positions of a block, with a residual."""

    groups: int
    heads: int
    dtype: DTypeLike
    attention: Attention

    @nn.compact
    def __call__(self, x: Float[Array, "n height width channels"]) -> Float[Array, "n height width channels"]:
        n, height, width, channels = x.shape
        y = group_norm(self.groups, self.dtype, "norm")(x)
        q, k, v = (
            dense(channels, ("conv_in", "conv_out"), self.dtype, name=name)(y).reshape(
                n, height * width, self.heads, -1
            )
            for name in ("query", "key", "value")
        )
        attended = self.attention.attend(q, k, v).reshape(x.shape)
        return x + dense(channels, ("conv_in", "conv_out"), self.dtype, name="out")(attended)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Settings that `Downsampler` and `Upsampler` share. Tuples have one entry for each stage of `Downsampler`."""

    channels: tuple[int, ...]
    layers: int  # ResNet blocks of a stage of `Downsampler`; stages of `Upsampler` have one more
    attention: tuple[bool, ...]
    groups: int
    heads: int
    time_width: int
    time_embedding: str
    stride: int
    kernel: int  # size of all convolutions except those between stages
    dtype: DTypeLike
    implementation: Attention  # implementation of the self-attention
    fused_norm: bool = False  # see `layers.ResNetBlock`

    def layer(
        self, x: Float[Array, "n _ _ _"], time: Float[Array, "n _"], channels: int, attention: bool, name: str
    ) -> Float[Array, "n _ _ _"]:
        """Applies a ResNet block and, if `attention`, self-attention. Call it within a module."""
        x = ResNetBlock(
            channels, self.groups, self.dtype, self.kernel, fused_norm=self.fused_norm, name=f"resnet_{name}"
        )(x, time)
        if not attention:
            return x
        return AttentionBlock(self.groups, self.heads, self.dtype, self.implementation, name=f"attention_{name}")(x)


class Downsampler(nn.Module):
    """Maps latent blocks and timesteps to tokens and skip states."""

    width: int
    config: UNetConfig

    @nn.compact
    def __call__(
        self, z: Float[Array, "n height width C"], t: Num[Array, " n"]
    ) -> tuple[Float[Array, "n token_height token_width {self.width}"], list[Float[Array, "n _ _ _"]]]:
        config, dtype = self.config, self.config.dtype
        time = TimeEmbedding(config.time_width, config.time_embedding, dtype, name="time")(t)
        x = conv(config.channels[0], config.kernel, dtype, name="conv_in")(z.astype(dtype))
        skips = [x]
        for stage, channels in enumerate(config.channels):
            for i in range(config.layers):
                x = config.layer(x, time, channels, config.attention[stage], f"{stage}_{i}")
                skips.append(x)
            if stage + 1 < len(config.channels):
                x = conv(channels, 3, dtype, stride=config.stride, name=f"down_{stage}")(x)
                skips.append(x)
        return conv(self.width, config.kernel, dtype, name="conv_out")(x), skips


class Upsampler(nn.Module):
    """Maps tokens, timesteps and skip states to latent blocks."""

    out_channels: int
    config: UNetConfig  # the stages run in reverse

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "n token_height token_width d"],
        t: Num[Array, " n"],
        skips: Sequence[Float[Array, "n _ _ _"]],
    ) -> Float[Array, "n height width {self.out_channels}"]:
        config, dtype = self.config, self.config.dtype
        time = TimeEmbedding(config.time_width, config.time_embedding, dtype, name="time")(t)
        skips = list(skips)
        x = conv(config.channels[-1], config.kernel, dtype, name="conv_in")(h)
        stages = list(zip(config.channels, config.attention, strict=True))[::-1]
        for stage, (channels, attention) in enumerate(stages):
            for i in range(config.layers + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = config.layer(x, time, channels, attention, f"{stage}_{i}")
            if stage + 1 < len(stages):
                n, height, width, _ = x.shape
                x = jax.image.resize(x, (n, config.stride * height, config.stride * width, channels), "nearest")
                x = conv(channels, 3, dtype, name=f"up_{stage}")(x)
        # Always float32: solvers divide the error of eps by alpha, 0.006 or less at t = 999.
        return conv(self.out_channels, config.kernel, jnp.float32, precision="highest", name="conv_out")(x)
