"""The block U-Net of the yardstick (section 3.1), on (n, C, height, width)."""

import contextlib
import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net, one entry of a tuple per stage."""

    latent_channels: int
    width: int  # d, of the transformer
    channels: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    groups: int
    heads: int
    time_width: int
    raw_time: bool  # the timestep enters as one number, and not as sines and cosines
    stride: int
    kernel: int


def autocast(x: Tensor, enabled: bool) -> contextlib.AbstractContextManager[object]:
    """Computes in bfloat16 if `enabled` and in float32 otherwise, on the device of an array."""
    if x.is_meta:  # arrays without values, on which FLOPs are counted
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16, enabled=enabled)


class TimeEmbedding(nn.Module):
    """Linear, SiLU, Linear without biases, always in float32."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.linear_1 = nn.Linear(1 if config.raw_time else config.time_width, config.time_width, bias=False)
        self.linear_2 = nn.Linear(config.time_width, config.time_width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        with autocast(t, False):
            x = t[:, None].float()
            if not self.config.raw_time:
                half = self.config.time_width // 2
                x = x * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
                x = torch.cat([x.cos(), x.sin()], dim=1)
            return self.linear_2(silu(self.linear_1(x)))


def _conv(channels: int, features: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, features, size, stride, padding=(size - 1) // 2)


class ResNetBlock(nn.Module):
    """Twice GroupNorm, SiLU and convolution, with the time embedding in between and a shortcut."""

    def __init__(self, config: UNetConfig, channels: int, features: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.conv1 = _conv(channels, features, config.kernel)
        self.time = nn.Linear(config.time_width, features)
        self.norm2 = nn.GroupNorm(config.groups, features, eps=1e-6)
        self.conv2 = _conv(features, features, config.kernel)
        self.shortcut = _conv(channels, features, 1) if channels != features else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.time(silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """GroupNorm and self-attention over the positions of a block, with a residual."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        y = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, channels)
        q, k, v = self.qkv(y).view(n, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height, width, channels)
        return x + self.out(y).permute(0, 3, 1, 2)


class Downsampler(nn.Module):
    """Maps latent blocks to tokens and skip states."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.time = TimeEmbedding(config)
        before = config.channels[0]
        self.conv_in = _conv(config.latent_channels, before, config.kernel)
        self.stages, self.between = nn.ModuleList(), nn.ModuleList()
        for stage, channels in enumerate(config.channels):
            layers = nn.ModuleList()
            for _ in range(config.layers):
                resnet = ResNetBlock(config, before, channels)
                attention = AttentionBlock(config, channels) if config.attention[stage] else nn.Identity()
                layers.append(nn.ModuleList([resnet, attention]))
                before = channels
            self.stages.append(layers)
            if stage + 1 < len(config.channels):
                self.between.append(_conv(channels, channels, 3, config.stride))
        self.conv_out = _conv(before, config.width, config.kernel)

    def forward(self, z: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        time = self.time(t)
        x = self.conv_in(z)
        skips = [x]
        for stage, layers in enumerate(self.stages):
            for resnet, attention in layers:
                x = attention(resnet(x, time))
                skips.append(x)
            if stage < len(self.between):
                x = self.between[stage](x)
                skips.append(x)
        return self.conv_out(x), skips


class Upsampler(nn.Module):
    """Maps tokens and skip states to latent blocks. The last convolution is always in float32."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.time, self.stride = TimeEmbedding(config), config.stride
        skips = [config.channels[0]]
        for stage, channels in enumerate(config.channels):
            skips += [channels] * (config.layers + (stage + 1 < len(config.channels)))
        before = config.channels[-1]
        self.conv_in = _conv(config.width, before, config.kernel)
        self.stages, self.between = nn.ModuleList(), nn.ModuleList()
        for stage, channels in reversed(list(enumerate(config.channels))):
            layers = nn.ModuleList()
            for _ in range(config.layers + 1):
                resnet = ResNetBlock(config, before + skips.pop(), channels)
                attention = AttentionBlock(config, channels) if config.attention[stage] else nn.Identity()
                layers.append(nn.ModuleList([resnet, attention]))
                before = channels
            self.stages.append(layers)
            if stage:
                self.between.append(_conv(channels, channels, 3))
        self.conv_out = _conv(before, config.latent_channels, config.kernel)

    def forward(self, h: Tensor, t: Tensor, skips: list[Tensor]) -> Tensor:
        time, skips = self.time(t), list(skips)
        x = self.conv_in(h)
        for stage, layers in enumerate(self.stages):
            for resnet, attention in layers:
                x = attention(resnet(torch.cat([x, skips.pop()], dim=1), time))
            if stage < len(self.between):
                if self.stride > 1:
                    x = interpolate(x, scale_factor=self.stride, mode="nearest")
                x = self.between[stage](x)
        with autocast(x, False):
            return self.conv_out(x.float())
