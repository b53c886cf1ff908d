"""Image to latent to blocks and back: the only place where each happens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from einops import rearrange
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.models import vae as vae_model
from madformer_jax.models.vae import AutoencoderKL, Params
from madformer_jax.sizes import VAE_CHANNELS, VAE_DOWNSAMPLING, Sizes
from madformer_jax.weights import vae as vae_weights


def to_blocks(z: Any, sizes: Sizes) -> Array:
    """Latent (B, h, w, C) -> blocks (B, L, positions, C): blocks in raster order, a block's positions likewise."""
    p, q = sizes.block_side, sizes.block_width
    return rearrange(z, "b (i p) (j q) c -> b (i j) (p q) c", p=p, q=q)


def from_blocks(blocks: Array, sizes: Sizes) -> Array:
    """The inverse of `to_blocks`."""
    return rearrange(blocks, "b (i j) (p q) c -> b (i p) (j q) c", i=sizes.grid, p=sizes.block_side)


class Codec(NamedTuple):
    """Image <-> latent.

    params: weights, passed to the two functions so that a jitted program takes them as an argument.
    encode: (params, batch of the input pipeline, key) -> z (B, h, w, C).
    decode: (params, z) -> images (B, H, W, c) in [-1, 1].
    """

    params: Any
    encode: Callable[[Any, Mapping[str, Array], Array], Array]
    decode: Callable[[Any, Array], Array]


def pixel(patch: int) -> Codec:
    """Space-to-depth: a square of `patch` x `patch` pixels becomes the channels of one latent position."""

    def encode(params: Any, batch: Mapping[str, Array], key: Array) -> Array:
        return rearrange(batch["image"], "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)

    def decode(params: Any, z: Array) -> Array:
        return rearrange(z, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)

    return Codec({}, encode, decode)


def build(c: ConfigDict) -> Codec:
    """The codec of a validated config.

    Raises:
      ConfigError: the VAE's weights are missing or do not fit.
    """
    return vae(c.codec.path, c.codec.dtype) if c.codec.name == "vae" else pixel(c.codec.patch)


def vae(path: str, dtype: str) -> Codec:
    """Image <-> latent of the VAE, scaled, with weights from wherever `weights.vae.load` finds them.

    Raises:
      ConfigError: no weights there, they do not fit, or the network is of another kind than Stable Diffusion's.
    """
    model, params = vae_weights.load(path, dtype)
    if (model.reduction, model.latent_channels) != (VAE_DOWNSAMPLING, VAE_CHANNELS):
        raise ConfigError(
            f"config.codec.path={path!r} has {model.latent_channels} latent channels at 1/{model.reduction} of the "
            f"side; a VAE with {VAE_CHANNELS} at 1/{VAE_DOWNSAMPLING} is needed."
        )

    return of_vae(model, params)


def of_vae(model: AutoencoderKL, params: Params) -> Codec:
    """The codec of a network and its weights, or their abstract shapes."""

    def encode_batch(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        cached = "mean" in batch
        mean, logvar = (batch["mean"], batch["logvar"]) if cached else vae_model.encode(model, params, batch["image"])
        return model.scaling_factor * vae_model.sample(mean, logvar, key)

    def decode_batch(params: Params, z: Array) -> Array:
        return vae_model.decode(model, params, z / model.scaling_factor)

    return Codec(params, encode_batch, decode_batch)
