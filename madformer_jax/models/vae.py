"""AutoencoderKL, the VAE of Stable Diffusion, SDXL, SD3 and FLUX, in channels-last layout.

`sampling.codec` encodes and decodes batches with it, and `weights.vae_weights` converts checkpoints.
Modules are named as in diffusers, so that the path of a parameter is its name in a diffusers
checkpoint. Latents here are unscaled. `sampling.codec` subtracts `shift_factor` and multiplies by
`scaling_factor`.

Dimensions: B images, H x W pixels, c channels of an image; h x w positions and C channels of a
latent, h = H / `reduction`; d channels of a layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from madformer_jax.config.shapes import SCALING_FACTOR
from madformer_jax.models.layers import Params, ResNetBlock, conv, dense, group_norm
from madformer_jax.runtime import partitioning

FLOAT32 = jnp.dtype("float32")
# Attention scores in memory, 64 MiB: 1 chunk of queries for a 512 x 512 image, 16 for 1024 x 1024.
MAX_ATTENTION_SCORES = 2**24
# Pixels in one pass of `encode` and `decode` on each device. Float32 activations of 1024 x 1024 pixels fit 8 GiB.
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
    def __call__(self, x: Float[Array, "B h w d"]) -> Float[Array, "B h w d"]:
        batch, height, width, channels = x.shape

        def linear(name: str) -> nn.Dense:
            return dense(channels, ("conv_in", "conv_out"), self.dtype, name=name)

        h = group_norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = linear("to_q")(h), linear("to_k")(h), linear("to_v")(h)  # (B, h * w, d)

        def attend(query: Array) -> Array:  # (B, d): one position of every image
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
    def __call__(self, x: Float[Array, "B h w d_in"]) -> Float[Array, "B h_out w_out d"]:
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
    def __call__(self, x: Float[Array, "B h w d"]) -> Float[Array, "B h//2 w//2 d"]:
        padding = ((0, 1), (0, 1))
        return conv(self.channels, 3, self.dtype, stride=2, padding=padding, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w d"]) -> Float[Array, "B 2*h 2*w d"]:
        return conv(self.channels, 3, self.dtype, name="conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class MidBlock(nn.Module):
    """Two ResNet blocks at the lowest resolution, with optional attention between them."""

    channels: int
    groups: int
    attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w d"]) -> Float[Array, "B h w d"]:
        x = _resnet_block(self.channels, self.groups, self.dtype, "resnets_0")(x)
        if self.attention:
            x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return _resnet_block(self.channels, self.groups, self.dtype, "resnets_1")(x)


class Encoder(nn.Module):
    """Maps images to mean and log-variance channels, before quant_conv."""

    channels: tuple[int, ...]  # of each stage, from the highest resolution to the lowest
    out_channels: int
    layers: int
    groups: int
    mid_attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"]) -> Float[Array, "B h w moments"]:
        x = conv(self.channels[0], 3, self.dtype, name="conv_in")(x)
        for i, channels in enumerate(self.channels):
            resample = "down" if i < len(self.channels) - 1 else ""
            x = Stage(channels, self.layers, self.groups, resample, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.channels[-1], self.groups, self.mid_attention, self.dtype, name="mid_block")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return conv(self.out_channels, 3, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Maps latents after post_quant_conv to images."""

    channels: tuple[int, ...]  # of each stage, from the highest resolution to the lowest
    out_channels: int
    layers: int
    groups: int
    mid_attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W c"]:
        x = conv(self.channels[-1], 3, self.dtype, name="conv_in")(z)
        x = MidBlock(self.channels[-1], self.groups, self.mid_attention, self.dtype, name="mid_block")(x)
        for i, channels in enumerate(reversed(self.channels)):
            resample = "up" if i < len(self.channels) - 1 else ""
            x = Stage(channels, self.layers, self.groups, resample, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return conv(self.out_channels, 3, self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The VAE of latent diffusion models, by default that of Stable Diffusion with 83.65 M parameters.

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
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: jnp.dtype = FLOAT32

    def setup(self) -> None:
        channels, layers = tuple(self.block_out_channels), self.layers_per_block
        settings = self.norm_num_groups, self.mid_block_add_attention, self.dtype
        self.encoder = Encoder(channels, 2 * self.latent_channels, layers, *settings)
        self.decoder = Decoder(channels, self.out_channels, layers + 1, *settings)
        if self.use_quant_conv:
            self.quant_conv = conv(2 * self.latent_channels, 1, self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv(self.latent_channels, 1, self.dtype)

    @property
    def reduction(self) -> int:
        """Side of a latent position in pixels."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, images: Float[Array, "B H W c"]) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Encodes images in [-1, 1] to mean and log-variance of the posterior, float32."""
        moments = self.encoder(images)
        moments = self.quant_conv(moments) if self.use_quant_conv else moments
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)  # the bounds of diffusers, which keep the variance finite

    def decode(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W c"]:
        """Decodes unscaled latents to images, about [-1, 1], float32."""
        z = self.post_quant_conv(z) if self.use_post_quant_conv else z
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, images: Float[Array, "B H W c"]) -> Float[Array, "B H W c"]:
        """Reconstructs images from the posterior mean; `init` creates all parameters with it."""
        return self.decode(self.encode(images)[0])


@functools.lru_cache(maxsize=2)  # tracing the model takes 1 to 2 seconds
def abstract_params(model: AutoencoderKL) -> Any:
    """Returns shapes and types of the parameters."""
    image = jax.ShapeDtypeStruct((1, model.reduction, model.reduction, model.in_channels), jnp.float32)
    with nn.logical_axis_rules(()):  # a mesh that is in use does not shard shapes
        return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)["params"])


def typical_vae(latent_channels: int, downsampling: int, dtype: jnp.dtype = FLOAT32) -> AutoencoderKL:
    """Returns a VAE of the usual widths, for estimates of cost and memory without its config.json.

    Args:
      latent_channels: C.
      downsampling: Side of a latent position in pixels, a power of 2. 8 gives the widths of Stable
        Diffusion, SDXL, SD3 and FLUX.
      dtype: Type of the computation.
    """
    stages = downsampling.bit_length()
    widths = (*AutoencoderKL.block_out_channels, *[AutoencoderKL.block_out_channels[-1]] * stages)[:stages]
    return AutoencoderKL(block_out_channels=widths, latent_channels=latent_channels, dtype=dtype)


# Batches of any size


def encode(
    model: AutoencoderKL, params: Params, images: Float[Array, "B H W c"]
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Runs `AutoencoderKL.encode` on a batch of any size; pure and jittable.

    Args:
      model: The VAE.
      params: Its parameters.
      images: Images in [-1, 1].

    Returns:
      Mean and log-variance of the posterior.
    """
    return _map_chunks(functools.partial(_apply, model, params, "encode"), images, images.shape[1] * images.shape[2])


def decode(model: AutoencoderKL, params: Params, z: Float[Array, "B h w C"]) -> Float[Array, "B H W c"]:
    """Runs `AutoencoderKL.decode` on a batch of any size; pure and jittable.

    A 1024 x 1024 image takes 4.6 GiB in float32.

    Args:
      model: The VAE.
      params: Its parameters.
      z: Unscaled latents.
    """
    pixels = z.shape[1] * z.shape[2] * model.reduction**2
    return _map_chunks(functools.partial(_apply, model, params, "decode"), z, pixels)


def _apply(model: AutoencoderKL, params: Params, method: str, x: Array) -> Any:
    """Calls a method of the VAE without sharding its kernels; a mesh splits the images only."""
    with nn.logical_axis_rules(()):
        return model.apply({"params": params}, x, method=method)


def _map_chunks(f: Callable[[Array], Any], x: Array, pixels: int) -> Any:
    """Computes f(x) in a loop over chunks with an equal number of images, of `pixels` each, from every device."""
    max_images = max(1, MAX_PIXELS_PER_PASS // pixels)
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.gcd(len(x), 1 if mesh.empty else partitioning.batch_devices(mesh))
    rows = len(x) // devices
    chunk = max(n for n in range(1, min(max_images, rows) + 1) if rows % n == 0)
    if chunk == rows:
        return f(x)
    chunks = rearrange(x, "(d p s) ... -> p (d s) ...", d=devices, s=chunk)
    chunks = nn.with_logical_constraint(chunks, (None, "batch") + (None,) * (x.ndim - 1))
    return jax.tree.map(lambda y: rearrange(y, "p (d s) ... -> (d p s) ...", d=devices), jax.lax.map(f, chunks))


def sample_posterior(
    mean: Float[Array, "B h w C"], logvar: Float[Array, "B h w C"], key: Array
) -> Float[Array, "B h w C"]:
    """Draws unscaled latents, float32, from a posterior of any float type."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
