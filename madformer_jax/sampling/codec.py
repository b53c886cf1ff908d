"""Conversions between images, latents and blocks.

Training encodes with a `Codec`, sampling decodes with one, and `modes.prepare` encodes with an
`Encoder`. Add a codec as a function that returns a `Codec`, and choose it in `build`.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from jaxtyping import Float, Num, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from madformer_jax.config.shapes import SCALING_FACTOR, VAE_CHANNELS, VAE_DOWNSAMPLING, Sizes
from madformer_jax.errors import ConfigError
from madformer_jax.models import vae as vae_model
from madformer_jax.models.vae import AutoencoderKL, Params
from madformer_jax.runtime import partitioning
from madformer_jax.weights import vae_weights
from madformer_jax.weights.fingerprint import fingerprint

AnyArray = TypeVar("AnyArray", Array, np.ndarray)
Batch = Mapping[str, Any]  # arrays of the input pipeline, by name


def to_blocks(z: Num[AnyArray, "B height width C"], sizes: Sizes) -> Num[AnyArray, "B L positions C"]:
    """Splits latents into blocks, both in raster order."""
    p, q = sizes.block_side, sizes.block_width
    return rearrange(z, "b (i p) (j q) c -> b (i j) (p q) c", p=p, q=q)


def from_blocks(blocks: Num[AnyArray, "B L positions C"], sizes: Sizes) -> Num[AnyArray, "B height width C"]:
    """Joins blocks to latents; the inverse of `to_blocks`."""
    return rearrange(blocks, "b (i j) (p q) c -> b (i p) (j q) c", i=sizes.grid, p=sizes.block_side)


def to_float(image: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Converts uint8 to float32 in [-1, 1]: x / 127.5 - 1, both steps rounded.

    XLA replaces a division by a constant by a product with its inverse, which changes the last bit
    of four in five results. In base 256, x / 255 is the digit x repeated forever. The first two
    digits are exact, and a product gives enough of the others, however XLA reassociates or fuses
    it.
    """
    digits = jnp.asarray(image).astype(jnp.float32) * (257 / 2**15)  # first two digits of 2 x / 255
    return digits + digits * (2**-16 + 2**-32) - 1


class Codec(NamedTuple):
    """Functions that convert between images and latents.

    The weights are an argument of both conversions, so that a jitted program takes them as an
    input.

    Attributes:
      load: () -> params. Reads the weights at the first call, because not every user of a codec
        needs them.
      encode: (params, batch of the input pipeline, key) -> z. Converts images from uint8. For cached
        latents, params may be {}.
      decode: (params, z) -> images in [-1, 1].
    """

    load: Callable[[], Params]
    encode: Callable[[Params, Batch, PRNGKeyArray], Float[Array, "B height width C"]]
    decode: Callable[[Params, Float[Array, "B height width C"]], Float[Array, "B H W c"]]


def pixel(patch: int) -> Codec:
    """Returns the codec that moves `patch` x `patch` pixels to the channels of one position."""

    def encode(params: Params, batch: Batch, key: PRNGKeyArray | None) -> Float[Array, "B height width C"]:
        return rearrange(to_float(batch["image"]), "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)

    def decode(params: Params, z: Float[Array, "B height width C"]) -> Float[Array, "B H W c"]:
        return rearrange(z, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)

    return Codec(dict, encode, decode)


def build(c: ConfigDict) -> Codec:
    """Returns the codec of a validated config."""
    return vae(c.codec.path, c.codec.dtype, c.codec.scaling_factor) if c.codec.name == "vae" else pixel(c.codec.patch)


def describe(c: ConfigDict, weights: str) -> dict[str, Any]:
    """Returns the codec's settings for a protocol, which names its weights by their fingerprint."""
    return json.loads(c.codec.to_json()) | {"path": weights}


def load_vae(path: str, dtype: str) -> tuple[AutoencoderKL, Params]:
    """Reads a VAE and checks that a model can read its latents.

    Raises:
      ConfigError: The folder has no weights, they do not fit, or the latents have another shape
        than Stable Diffusion's.
    """
    model, params = vae_weights.load(path, dtype)
    if (model.reduction, model.latent_channels) != (VAE_DOWNSAMPLING, VAE_CHANNELS):
        raise ConfigError(
            f"config.codec.path={path!r} has {model.latent_channels} latent channels at 1/{model.reduction} of the "
            f"side; a VAE with {VAE_CHANNELS} at 1/{VAE_DOWNSAMPLING} is needed."
        )
    return model, params


def vae(path: str, dtype: str, scaling_factor: float) -> Codec:
    """Returns the codec of a VAE, whose latents are scaled.

    Its functions, and tracing them, raise ConfigError if the weights are missing or do not fit, if
    the VAE is of another kind than Stable Diffusion's, or if it has another scaling factor.

    Args:
      path: Folder or hub id of the VAE (`vae_weights.load`).
      dtype: Dtype of its computations.
      scaling_factor: Factor of the latents.
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
    """A VAE that encodes images for --mode=prepare, and facts that readers of its latents need."""

    # images -> mean, logvar
    encode: Callable[
        [UInt8[np.ndarray, "B H W c"]], tuple[Float[Array, "B height width C"], Float[Array, "B height width C"]]
    ]
    batch: int  # images per call
    weights: str  # fingerprint of the weights
    dtype: str = "float32"
    scaling_factor: float = SCALING_FACTOR
    shift_factor: float = 0.0  # VAEs with another value are refused
    channels: int = VAE_CHANNELS
    downsampling: int = VAE_DOWNSAMPLING

    def describe(self) -> dict[str, Any]:
        """Returns the facts, for the manifest of prepared latents."""
        return {name: value for name, value in self._asdict().items() if name not in ("encode", "batch")}


def encoder(c: ConfigDict, batch: int) -> Encoder:
    """Makes the encoder of the VAE at `codec.path`, spread over all devices of this process.

    Args:
      c: The config.
      batch: Images per call, rounded up to a multiple of the devices.

    Raises:
      ConfigError: See `load_vae`.
    """
    model, params = load_vae(c.codec.path, c.codec.dtype)
    weights, devices = fingerprint(params), len(jax.local_devices())
    mesh = partitioning.make_mesh(-1, 1, 1, jax.local_devices())
    rows = partitioning.batch_sharding(mesh)
    params = jax.device_put(params, partitioning.replicated(mesh))
    program = jax.jit(lambda params, images: vae_model.encode(model, params, to_float(images)), out_shardings=rows)

    def encode(
        images: UInt8[np.ndarray, "B H W c"],
    ) -> tuple[Float[Array, "B height width C"], Float[Array, "B height width C"]]:
        with partitioning.scope(mesh):
            return program(params, jax.device_put(images, rows))

    return Encoder(encode, math.ceil(batch / devices) * devices, weights, c.codec.dtype, model.scaling_factor)


def require_weights(codec: Codec, weights: str) -> Codec:
    """Returns a codec whose `load` checks that its weights made the cached latents.

    Args:
      codec: The codec.
      weights: Fingerprint of the weights that made the latents. "" for images, or if it is not
        known: the codec is returned as it is.

    Raises:
      ConfigError: `load` of the result raises it if the weights differ.
    """

    def load() -> Params:
        params = codec.load()
        if (loaded := fingerprint(params)) != weights:
            raise ConfigError(
                f"config.codec.path: its weights ({loaded}) are not those that made the latents of config.data.path "
                f"({weights}): give the VAE that prepared them."
            )
        return params

    return codec._replace(load=functools.cache(load)) if weights else codec


def from_network(load: Callable[[], tuple[AutoencoderKL, Params]], scaling_factor: float) -> Codec:
    """Returns the codec of a network and its weights, which may be abstract shapes."""
    loaded = functools.cache(load)

    def encode(params: Params, batch: Batch, key: PRNGKeyArray) -> Float[Array, "B height width C"]:
        if "mean" in batch:  # cached latents
            mean, logvar = batch["mean"], batch["logvar"]
        else:
            mean, logvar = vae_model.encode(loaded()[0], params, to_float(batch["image"]))
        return scaling_factor * vae_model.sample_posterior(mean, logvar, key)

    def decode(params: Params, z: Float[Array, "B height width C"]) -> Float[Array, "B H W c"]:
        return vae_model.decode(loaded()[0], params, z / scaling_factor)

    return Codec(lambda: loaded()[1], encode, decode)
