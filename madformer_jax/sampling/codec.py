"""Image to latent to blocks and back: the only place where each happens."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config.shapes import SCALING_FACTOR, VAE_CHANNELS, VAE_DOWNSAMPLING, Sizes
from madformer_jax.errors import ConfigError
from madformer_jax.models import vae as vae_model
from madformer_jax.models.vae import AutoencoderKL, Params
from madformer_jax.runtime import partitioning
from madformer_jax.weights import vae_weights
from madformer_jax.weights.fingerprint import fingerprint


def to_blocks(z: Any, sizes: Sizes) -> Array:
    """Latent (B, h, w, C) -> blocks (B, L, positions, C): blocks in raster order, a block's positions likewise."""
    p, q = sizes.block_side, sizes.block_width
    return rearrange(z, "b (i p) (j q) c -> b (i j) (p q) c", p=p, q=q)


def from_blocks(blocks: Array, sizes: Sizes) -> Array:
    """The inverse of `to_blocks`."""
    return rearrange(blocks, "b (i j) (p q) c -> b (i p) (j q) c", i=sizes.grid, p=sizes.block_side)


def to_float(image: Any) -> Array:
    """uint8 -> float32 in [-1, 1], any shape: x / 127.5 - 1, both steps rounded as IEEE says.

    XLA makes a product with the inverse of a division by a constant, and four of five results would differ in their last bit
    from a division's. In base 256, x / 255 is the digit x for ever: the first two are exact, and a product gives enough of
    the others, whichever way it is reassociated or fused.
    """
    digits = jnp.asarray(image).astype(jnp.float32) * (257 / 2**15)  # of 2 x / 255
    return digits + digits * (2**-16 + 2**-32) - 1


class Codec(NamedTuple):
    """Image <-> latent.

    load: () -> params, the weights, which are read when this is first called: not all who have a codec need them.
    encode: (params, batch of the input pipeline, key) -> z (B, h, w, C).
      Images are uint8 and become floats here. Cached latents need no params: {} will do.
    decode: (params, z) -> images (B, H, W, c) in [-1, 1].

    Params are an argument of both, so that a jitted program takes them as one.
    """

    load: Callable[[], Any]
    encode: Callable[[Any, Mapping[str, Array], Array], Array]
    decode: Callable[[Any, Array], Array]


def pixel(patch: int) -> Codec:
    """Space-to-depth: a square of `patch` x `patch` pixels becomes the channels of one latent position."""

    def encode(params: Any, batch: Mapping[str, Array], key: Array) -> Array:
        return rearrange(to_float(batch["image"]), "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)

    def decode(params: Any, z: Array) -> Array:
        return rearrange(z, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)

    return Codec(dict, encode, decode)


def build(c: ConfigDict) -> Codec:
    """The codec of a validated config."""
    return vae(c.codec.path, c.codec.dtype, c.codec.scaling_factor) if c.codec.name == "vae" else pixel(c.codec.patch)


def describe(c: ConfigDict, weights: str) -> dict[str, Any]:
    """The codec's settings, for a protocol: the fingerprint of its weights in place of where they lie."""
    return json.loads(c.codec.to_json()) | {"path": weights}


def load_vae(path: str, dtype: str) -> tuple[AutoencoderKL, Params]:
    """Reads a VAE whose latents a model can take.

    Raises:
      ConfigError: There are no weights, they do not fit, or the latents are of another shape than Stable Diffusion's.
    """
    model, params = vae_weights.load(path, dtype)
    if (model.reduction, model.latent_channels) != (VAE_DOWNSAMPLING, VAE_CHANNELS):
        raise ConfigError(
            f"config.codec.path={path!r} has {model.latent_channels} latent channels at 1/{model.reduction} of the "
            f"side; a VAE with {VAE_CHANNELS} at 1/{VAE_DOWNSAMPLING} is needed."
        )
    return model, params


def vae(path: str, dtype: str, scaling_factor: float) -> Codec:
    """Image <-> latent of the VAE, scaled, with weights from wherever `weights.vae.load` finds them.

    Its functions raise ConfigError, and so does tracing them, if there are no weights, or if they do not fit, are of another
    kind than Stable Diffusion's or have another scaling factor.
    """

    def load() -> tuple[AutoencoderKL, Params]:
        model, params = load_vae(path, dtype)
        if not math.isclose(model.scaling_factor, scaling_factor):
            raise ConfigError(
                f"config.codec.scaling_factor={scaling_factor}, but the VAE at config.codec.path={path!r} says "
                f"{model.scaling_factor}: set that, or choose the VAE that the model was trained with."
            )
        return model, params

    return from_network(load, scaling_factor)


class Encoder(NamedTuple):
    """A VAE that encodes images for --mode=prepare, and the facts of it that whoever reads the latents must know."""

    encode: Callable[[Any], tuple[Any, Any]]  # images uint8 (batch, H, W, c) -> mean, logvar (batch, h, w, C)
    batch: int  # images that it takes at once
    weights: str  # their fingerprint
    dtype: str = "float32"
    scaling_factor: float = SCALING_FACTOR
    shift_factor: float = 0.0  # a VAE with another one is refused
    channels: int = VAE_CHANNELS
    downsampling: int = VAE_DOWNSAMPLING

    def describe(self) -> dict[str, Any]:
        """Returns the facts, for the manifest of prepared latents."""
        return {name: value for name, value in self._asdict().items() if name not in ("encode", "batch")}


def encoder(c: ConfigDict, batch: int) -> Encoder:
    """Makes the encoder of the VAE at `codec.path` over all devices of this process.

    Args:
      c: The config.
      batch: Images that it takes at once; more where the devices do not divide them.

    Raises:
      ConfigError: As `load_vae`.
    """
    model, params = load_vae(c.codec.path, c.codec.dtype)
    weights, devices = fingerprint(params), len(jax.local_devices())
    mesh = partitioning.make_mesh(-1, 1, 1, jax.local_devices())
    rows = partitioning.batch_sharding(mesh)
    params = jax.device_put(params, partitioning.replicated(mesh))
    program = jax.jit(lambda params, images: vae_model.encode(model, params, to_float(images)), out_shardings=rows)

    def encode(images: Any) -> tuple[Any, Any]:
        with partitioning.scope(mesh):
            return program(params, jax.device_put(images, rows))

    return Encoder(encode, math.ceil(batch / devices) * devices, weights, c.codec.dtype, model.scaling_factor)


def require_weights(codec: Codec, weights: str) -> Codec:
    """The codec, whose `load` raises ConfigError unless its weights are those (`weights.fingerprint`) that made cached latents.

    With weights "", of images or of latents whose VAE is not known, it is the same codec.
    """

    def load() -> Any:
        params = codec.load()
        if (found := fingerprint(params)) != weights:
            raise ConfigError(
                f"config.codec.path: its weights ({found}) are not those that made the latents of config.data.path "
                f"({weights}): give the VAE that prepared them."
            )
        return params

    return codec._replace(load=functools.cache(load)) if weights else codec


def from_network(load: Callable[[], tuple[AutoencoderKL, Params]], scaling_factor: float) -> Codec:
    """The codec of a network and its weights, or their abstract shapes."""
    loaded = functools.cache(load)

    def encode(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        if "mean" in batch:  # cached latents
            mean, logvar = batch["mean"], batch["logvar"]
        else:
            mean, logvar = vae_model.encode(loaded()[0], params, to_float(batch["image"]))
        return scaling_factor * vae_model.sample_posterior(mean, logvar, key)

    def decode(params: Params, z: Array) -> Array:
        return vae_model.decode(loaded()[0], params, z / scaling_factor)

    return Codec(lambda: loaded()[1], encode, decode)
