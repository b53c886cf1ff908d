"""AutoencoderKL, the VAE of Stable Diffusion, in channels-last layout.

`sampling.codec` encodes and decodes batches with it, and `weights.vae_weights` converts checkpoints.
Modules are named as in diffusers, so that the path of a parameter is its name in a diffusers
checkpoint. Latents here are unscaled. `sampling.codec` multiplies them by `scaling_factor`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from madformer_jax.config.shapes import SCALING_FACTOR
from madformer_jax.models.layers import ResNetBlock, conv, dense, group_norm
from madformer_jax.runtime import partitioning

Array = jax.Array
Params = Mapping[str, Any]

# Attention scores in memory, 64 MiB: 1 chunk of queries for a 512 x 512 image, 16 for 1024 x 1024.
MAX_ATTENTION_SCORES = 2**24
# Pixels in one pass of `encode` and `decode`. Float32 activations of 1024 x 1024 pixels fit 8 GiB.
MAX_PIXELS_PER_PASS = 1024 * 1024


def _resnet_block(channels: int, groups: int, dtype: jnp.dtype, name: str) -> ResNetBlock:
    return ResNetBlock(channels, groups, dtype, shortcut="conv_shortcut", name=name)


class Attention(nn.Module):
    """Self-attention over all positions with one head.

    Chunks of queries bound the memory, and the result is exact for any image size.
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape

        def linear(name: str) -> nn.Dense:
            return dense(channels, ("conv_in", "conv_out"), self.dtype, name=name)

        h = group_norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = linear("to_q")(h), linear("to_k")(h), linear("to_v")(h)  # (B, S, C)

        def attend(query: Array) -> Array:  # (B, C): one position of every image
            scores = jnp.einsum("bc,bkc->bk", query, k, preferred_element_type=jnp.float32)
            return jnp.einsum("bk,bkc->bc", jax.nn.softmax(scores * channels**-0.5).astype(v.dtype), v)

        chunk = max(1, MAX_ATTENTION_SCORES // (batch * height * width))
        h = jax.lax.map(attend, q.swapaxes(0, 1), batch_size=chunk).swapaxes(0, 1)
        return x + linear("to_out_0")(h).reshape(x.shape)


class Stage(nn.Module):
    """ResNet blocks of one resolution, and a convolution that halves or doubles the resolution."""

    channels: int
    layers: int
    groups: int
    resample: str  # "down", "up" or ""
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = _resnet_block(self.channels, self.groups, self.dtype, f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample(self.channels, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(self.channels, self.dtype, name="upsamplers_0")(x)
        return x


class Downsample(nn.Module):
    """3 x 3 convolution with stride 2, padded at the bottom and on the right only."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = ((0, 1), (0, 1))
        return conv(self.channels, 3, self.dtype, stride=2, padding=padding, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return conv(self.channels, 3, self.dtype, name="conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class MidBlock(nn.Module):
    """ResNet block, attention and ResNet block at the lowest resolution."""

    channels: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _resnet_block(self.channels, self.groups, self.dtype, "resnets_0")(x)
        x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return _resnet_block(self.channels, self.groups, self.dtype, "resnets_1")(x)


class Encoder(nn.Module):
    """Maps images to mean and log-variance channels, before quant_conv."""

    channels: tuple[int, ...]  # of each stage, from the highest resolution to the lowest
    out_channels: int
    layers: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.channels[0], 3, self.dtype, name="conv_in")(x)
        for i, channels in enumerate(self.channels):
            resample = "down" if i < len(self.channels) - 1 else ""
            x = Stage(channels, self.layers, self.groups, resample, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.channels[-1], self.groups, self.dtype, name="mid_block")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return conv(self.out_channels, 3, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Maps latents after post_quant_conv to images."""

    channels: tuple[int, ...]  # of each stage, from the highest resolution to the lowest
    out_channels: int
    layers: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = conv(self.channels[-1], 3, self.dtype, name="conv_in")(z)
        x = MidBlock(self.channels[-1], self.groups, self.dtype, name="mid_block")(x)
        for i, channels in enumerate(reversed(self.channels)):
            resample = "up" if i < len(self.channels) - 1 else ""
            x = Stage(channels, self.layers, self.groups, resample, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return conv(self.out_channels, 3, self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The VAE of Stable Diffusion, by default with 83.65 M parameters.

    Fields are named as in config.json of diffusers.

    Attributes:
      dtype: Type of the computation. Parameters, statistics of GroupNorm, attention scores and
        results are float32.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = SCALING_FACTOR
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        channels, layers, groups = tuple(self.block_out_channels), self.layers_per_block, self.norm_num_groups
        self.encoder = Encoder(channels, 2 * self.latent_channels, layers, groups, self.dtype)
        self.decoder = Decoder(channels, self.out_channels, layers + 1, groups, self.dtype)
        self.quant_conv = conv(2 * self.latent_channels, 1, self.dtype)
        self.post_quant_conv = conv(self.latent_channels, 1, self.dtype)

    @property
    def reduction(self) -> int:
        """Side of a latent position in pixels."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Encodes images.

        Args:
          images: Images `(B, H, W, c)` in [-1, 1].

        Returns:
          Mean and log-variance of the posterior, each `(B, H / 8, W / 8, C)`, float32.
        """
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)  # the bounds of diffusers, which keep the variance finite

    def decode(self, z: Array) -> Array:
        """Decodes unscaled latents (B, h, w, C) to images (B, 8 h, 8 w, c), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Reconstructs images from the posterior mean; `init` creates all parameters with it."""
        return self.decode(self.encode(images)[0])


@functools.lru_cache(maxsize=2)  # tracing the model takes 1 to 2 seconds
def abstract_params(model: AutoencoderKL) -> Any:
    """Returns shapes and types of the parameters."""
    image = jax.ShapeDtypeStruct((1, model.reduction, model.reduction, model.in_channels), jnp.float32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)["params"])


# Batches of any size


def encode(model: AutoencoderKL, params: Params, images: Array, max_images: int | None = None) -> tuple[Array, Array]:
    """Runs `AutoencoderKL.encode` on a batch of any size; pure and jittable.

    Args:
      model: The VAE.
      params: Its parameters.
      images: Images `(B, H, W, c)` in [-1, 1].
      max_images: Images in one pass on each device, by default what `MAX_PIXELS_PER_PASS` allows.

    Returns:
      Mean and log-variance of the posterior.
    """
    max_images = max_images or max(1, MAX_PIXELS_PER_PASS // (images.shape[1] * images.shape[2]))
    return _map_chunks(functools.partial(_apply, model, params, "encode"), images, max_images)


def decode(model: AutoencoderKL, params: Params, z: Array, max_images: int | None = None) -> Array:
    """Runs `AutoencoderKL.decode` on a batch of any size; pure and jittable.

    A 1024 x 1024 image takes 4.6 GiB in float32.

    Args:
      model: The VAE.
      params: Its parameters.
      z: Unscaled latents `(B, h, w, C)`.
      max_images: Images in one pass on each device, by default what `MAX_PIXELS_PER_PASS` allows.

    Returns:
      Images `(B, 8 h, 8 w, c)`.
    """
    max_images = max_images or max(1, MAX_PIXELS_PER_PASS // (z.shape[1] * z.shape[2] * model.reduction**2))
    return _map_chunks(functools.partial(_apply, model, params, "decode"), z, max_images)


def _apply(model: AutoencoderKL, params: Params, method: str, x: Array) -> Any:
    """Calls a method of the VAE without sharding its kernels; a mesh splits the images only."""
    with nn.logical_axis_rules(()):
        return model.apply({"params": params}, x, method=method)


def _map_chunks(f: Callable[[Array], Any], x: Array, max_images: int) -> Any:
    """Computes f(x) in a loop over chunks with an equal number of rows from every device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.gcd(len(x), 1 if mesh.empty else partitioning.batch_devices(mesh))
    rows = len(x) // devices
    chunk = max(n for n in range(1, min(max_images, rows) + 1) if rows % n == 0)
    if chunk == rows:
        return f(x)
    chunks = rearrange(x, "(d p s) ... -> p (d s) ...", d=devices, s=chunk)
    chunks = nn.with_logical_constraint(chunks, (None, "batch") + (None,) * (x.ndim - 1))
    return jax.tree.map(lambda y: rearrange(y, "p (d s) ... -> (d p s) ...", d=devices), jax.lax.map(f, chunks))


def sample_posterior(mean: Array, logvar: Array, key: Array) -> Array:
    """Draws unscaled latents from the posterior.

    Args:
      mean: Mean of the posterior, of any float type.
      logvar: Log-variance, of the same shape.
      key: Random key.

    Returns:
      Latents of that shape, float32.
    """
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
