"""Analytic FLOPs of the convolutional networks: the block U-Net and the VAE, for one block or image.

`cost.flops` calls the functions and states what counts.
"""

import functools

from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.models.vae import AutoencoderKL

_SpatialSize = int | tuple[int, int]  # side of a square, or height and width


def downsampler(c: ConfigDict) -> tuple[float, float]:
    """Returns the FLOPs of the downsampler for one block, and those of its layers that read data.

    The backward pass computes no input gradient for the latter.
    """
    m, sizes = c.model, derive_sizes(c)
    height, width = sizes.block_side, sizes.block_width
    sides = 2 if m.block_order == "raster" else 4  # neighbors that the U-Net reads
    in_channels = (1 + sides * m.unet_context) * sizes.channels
    first = _conv((height, width), in_channels, m.unet_channels[0], m.unet_kernel) + _time_embedding(c)[0]
    total, before = first + _time_embedding(c)[1], m.unet_channels[0]
    for stage, channels in enumerate(m.unet_channels):
        for _ in range(m.unet_layers):
            total += _resnet((height, width), before, channels, m.unet_time_width, m.unet_kernel)
            total += _self_attention(height * width, channels) if m.unet_attention[stage] else 0.0
            before = channels
        if stage + 1 < len(m.unet_channels):
            total += _conv((height, width), channels, channels, stride=m.unet_stride)
            height, width = height // m.unet_stride, width // m.unet_stride
    return total + _conv((height, width), before, m.width, m.unet_kernel), first


def upsampler(c: ConfigDict) -> tuple[float, float]:
    """Returns the FLOPs of the upsampler for one block, in the form of `downsampler`."""
    m, sizes = c.model, derive_sizes(c)
    skips = [m.unet_channels[0]]
    for stage, channels in enumerate(m.unet_channels):
        skips += [channels] * (m.unet_layers + (stage + 1 < len(m.unet_channels)))
    height, width, before = sizes.token_side, sizes.token_width, m.unet_channels[-1]
    total = _conv((height, width), m.width, before, m.unet_kernel) + sum(_time_embedding(c))
    for stage, channels in reversed(list(enumerate(m.unet_channels))):
        for _ in range(m.unet_layers + 1):
            total += _resnet((height, width), before + skips.pop(), channels, m.unet_time_width, m.unet_kernel)
            total += _self_attention(height * width, channels) if m.unet_attention[stage] else 0.0
            before = channels
        if stage:
            height, width = height * m.unet_stride, width * m.unet_stride
            total += _conv((height, width), channels, channels)
    return total + _conv((height, width), before, sizes.channels, m.unet_kernel), _time_embedding(c)[0]


def vae_encode(side: int, v: AutoencoderKL) -> float:
    """Returns the FLOPs of encoding an image of side x side pixels."""
    total, before = _conv(side, v.in_channels, v.block_out_channels[0]), v.block_out_channels[0]
    for stage, channels in enumerate(v.block_out_channels):
        for _ in range(v.layers_per_block):
            total += _resnet(side, before, channels)
            before = channels
        if stage + 1 < len(v.block_out_channels):
            # Padded on one side: all side / 2 outputs have three taps, except for the last with two.
            total += 2.0 * (3 * (side // 2) - 1) ** 2 * channels**2
            side //= 2
    moments = 2 * v.latent_channels
    quant = _conv(side, moments, moments, 1) if v.use_quant_conv else 0.0
    return total + _vae_middle(side, before, v) + _conv(side, before, moments) + quant


def vae_decode(side: int, v: AutoencoderKL) -> float:
    """Returns the FLOPs of decoding an image of side x side pixels."""
    side //= v.reduction
    before = v.block_out_channels[-1]
    total = _conv(side, v.latent_channels, before) + _vae_middle(side, before, v)
    total += _conv(side, v.latent_channels, v.latent_channels, 1) if v.use_post_quant_conv else 0.0
    for stage, channels in enumerate(reversed(v.block_out_channels)):
        for _ in range(v.layers_per_block + 1):
            total += _resnet(side, before, channels)
            before = channels
        if stage + 1 < len(v.block_out_channels):
            side *= 2
            total += _conv(side, channels, channels)
    return total + _conv(side, before, v.out_channels)


def _time_embedding(c: ConfigDict) -> tuple[float, float]:
    """Returns the FLOPs of the two linear layers that embed a timestep."""
    width = c.model.unet_time_width
    return 2.0 * (1 if c.model.time_embedding == "raw" else width) * width, 2.0 * width**2


def _vae_middle(side: int, channels: int, v: AutoencoderKL) -> float:
    attention = _self_attention(side**2, channels) if v.mid_block_add_attention else 0.0
    return 2 * _resnet(side, channels, channels) + attention


def _resnet(side: _SpatialSize, channels: int, features: int, time_width: int = 0, kernel: int = 3) -> float:
    shortcut = _conv(side, channels, features, 1) if channels != features else 0.0
    convolutions = _conv(side, channels, features, kernel) + _conv(side, features, features, kernel)
    return convolutions + shortcut + 2.0 * time_width * features


def _self_attention(positions: int, channels: int) -> float:
    return 8.0 * positions * channels**2 + 4.0 * positions**2 * channels


def _conv(side: _SpatialSize, channels: int, features: int, size: int = 3, stride: int = 1) -> float:
    """Returns the FLOPs of a size x size convolution with padding size // 2 on each side."""
    height, width = side if isinstance(side, tuple) else (side, side)
    return 2.0 * _taps(height, size, stride) * _taps(width, size, stride) * channels * features


@functools.cache
def _taps(length: int, size: int, stride: int) -> int:
    """Returns the number of products of a convolution along one axis, without those with zero padding."""
    pad = size // 2
    outputs = (length + 2 * pad - size) // stride + 1
    return sum(0 <= o * stride + k - pad < length for o in range(outputs) for k in range(size))
