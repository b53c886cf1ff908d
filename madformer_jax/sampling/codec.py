"""Conversions between images, latents and blocks.

Training encodes with a `Codec`, sampling decodes with one, and `modes.prepare` encodes with an
`Encoder`. Add a codec as a function that returns a `Codec`, and choose it in `build`.
"""

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

from madformer_jax.config.shapes import SCALING_FACTOR, Sizes
from madformer_jax.errors import ConfigError
from madformer_jax.models import vae as vae_model
from madformer_jax.models.vae import AutoencoderKL, Params
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.weights import vae_weights
from madformer_jax.weights.fingerprint import fingerprint


def to_blocks(z: Any, sizes: Sizes) -> Array:
    """Splits latents (B, h, w, C) into blocks (B, L, positions, C), both in raster order."""
    p, q = sizes.block_side, sizes.block_width
    return rearrange(z, "b (i p) (j q) c -> b (i j) (p q) c", p=p, q=q)


def from_blocks(blocks: Array, sizes: Sizes) -> Array:
    """Joins blocks (B, L, positions, C) to latents (B, h, w, C); the inverse of `to_blocks`."""
    return rearrange(blocks, "b (i j) (p q) c -> b (i p) (j q) c", i=sizes.grid, p=sizes.block_side)


def to_float(image: Any) -> Array:
    """Converts uint8, any shape, to float32 in [-1, 1]: x / 127.5 - 1, both steps rounded.

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
      encode: (params, batch of the input pipeline, key) -> z (B, h, w, C). Converts images from
        uint8. For cached latents, params may be {}.
      decode: (params, z) -> images (B, H, W, c) in [-1, 1].
    """

    load: Callable[[], Any]
    encode: Callable[[Any, Mapping[str, Array], Array], Array]
    decode: Callable[[Any, Array], Array]


def pixel(patch: int) -> Codec:
    """Returns the codec that moves `patch` x `patch` pixels to the channels of one position."""

    def encode(params: Any, batch: Mapping[str, Array], key: Array) -> Array:
        return rearrange(to_float(batch["image"]), "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)

    def decode(params: Any, z: Array) -> Array:
        return rearrange(z, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)

    return Codec(dict, encode, decode)


class Scale(NamedTuple):
    """Scale of latents: the model sees (latent - shift) * factor."""

    factor: float
    shift: float

    def apply(self, z: Array) -> Array:
        return (z - self.shift) * self.factor if self.shift else self.factor * z

    def invert(self, z: Any) -> Any:
        return z / self.factor + self.shift if self.shift else z / self.factor


def build(c: ConfigDict) -> Codec:
    """Returns the codec of a validated config."""
    if c.codec.name == "pixel":
        return pixel(c.codec.patch)
    if c.codec.name == "external":
        return external(external_scale(c), c.data.channels)
    return from_network(lambda: load_vae(c), Scale(c.codec.scaling_factor, c.codec.shift_factor))


def describe(c: ConfigDict, weights: str) -> dict[str, Any]:
    """Returns the codec's settings for a protocol, which names its weights by their fingerprint.

    Protocols are hashed. Fields that earlier versions did not have are therefore left out at their defaults.
    """
    settings = json.loads(c.codec.to_json()) | {"path": weights}
    settings["scaling_factor"] = c.codec.scaling_factor or SCALING_FACTOR
    added = {"latent_channels": 4, "downsampling": 8, "shift_factor": 0.0}
    return {name: value for name, value in settings.items() if name not in added or value != added[name]}


def load_vae(c: ConfigDict) -> tuple[AutoencoderKL, Params]:
    """Reads the VAE at `codec.path` and checks that it fits the config.

    Raises:
      ConfigError: The folder has no weights, they do not fit, or the VAE has other sizes or another scale than the
        config.
    """
    model, params = vae_weights.load(c.codec.path, c.codec.dtype)
    actual: dict[str, float] = {
        "codec.latent_channels": model.latent_channels,
        "codec.downsampling": model.reduction,
        "data.channels": model.in_channels,
    }
    if c.codec.scaling_factor:
        actual |= {"codec.scaling_factor": model.scaling_factor, "codec.shift_factor": model.shift_factor}
    for field, value in actual.items():
        section, _, name = field.partition(".")
        if not math.isclose(c[section][name], value):
            raise ConfigError(
                f"config.{field}={c[section][name]}, but the VAE at config.codec.path={c.codec.path!r} has {value}: set "
                "that, or choose the VAE that the model was trained with."
            )
    return model, params


def resolve_scale(c: ConfigDict, prepared: tuple[float, float] | None) -> None:
    """Replaces a `codec.scaling_factor` of 0 by the factors of the latents, for a training to store.

    Args:
      c: The config, which is changed.
      prepared: Scaling and shift factor of the VAE that made prepared latents; None for other data.

    Raises:
      ConfigError: The VAE's config.json cannot be read.
    """
    if c.codec.name == "pixel" or c.codec.scaling_factor:
        return
    if prepared:
        scale = Scale(*prepared)
    elif c.codec.name == "external":
        scale = external_scale(c)
    else:
        model = vae_weights.load_config(c.codec.path)
        scale = Scale(model.scaling_factor, model.shift_factor)
    c.codec.scaling_factor, c.codec.shift_factor = scale


def adopt_scale(c: ConfigDict, workdir: str) -> None:
    """Replaces a `codec.scaling_factor` of 0 by the factors of a workdir, so that a VAE of another scale is refused."""
    stored = (checkpoint.read_config(workdir) or {}).get("codec", {})
    if c.codec.name != "pixel" and not c.codec.scaling_factor and stored.get("scaling_factor"):
        c.codec.scaling_factor, c.codec.shift_factor = stored["scaling_factor"], stored.get("shift_factor", 0.0)


def external_scale(c: ConfigDict) -> Scale:
    """Returns the scale of the latents of codec `external`."""
    return Scale(c.codec.scaling_factor or 1.0, c.codec.shift_factor)


class Encoder(NamedTuple):
    """A VAE that encodes images for --mode=prepare, and facts that readers of its latents need."""

    # images uint8 (batch, H, W, c) -> mean, logvar (batch, h, w, C)
    encode: Callable[[Any], tuple[Any, Any]]
    batch: int  # images per call
    weights: str  # fingerprint of the weights
    dtype: str = "float32"
    scaling_factor: float = SCALING_FACTOR
    shift_factor: float = 0.0
    channels: int = 4
    downsampling: int = 8

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
    model, params = load_vae(c)
    weights, devices = fingerprint(params), len(jax.local_devices())
    mesh = partitioning.make_mesh(-1, 1, 1, jax.local_devices())
    rows = partitioning.batch_sharding(mesh)
    params = jax.device_put(params, partitioning.replicated(mesh))
    program = jax.jit(lambda params, images: vae_model.encode(model, params, to_float(images)), out_shardings=rows)

    def encode(images: Any) -> tuple[Any, Any]:
        with partitioning.scope(mesh):
            return program(params, jax.device_put(images, rows))

    batch = math.ceil(batch / devices) * devices
    scale = model.scaling_factor, model.shift_factor
    return Encoder(encode, batch, weights, c.codec.dtype, *scale, model.latent_channels, model.reduction)


def require_weights(codec: Codec, weights: str) -> Codec:
    """Returns a codec whose `load` checks that its weights made the cached latents.

    Args:
      codec: The codec.
      weights: Fingerprint of the weights that made the latents. "" for images, or if it is not
        known: the codec is returned as it is.

    Raises:
      ConfigError: `load` of the result raises it if the weights differ.
    """

    def load() -> Any:
        params = codec.load()
        if (loaded := fingerprint(params)) != weights:
            raise ConfigError(
                f"config.codec.path: its weights ({loaded}) are not those that made the latents of config.data.path "
                f"({weights}): give the VAE that prepared them."
            )
        return params

    return codec._replace(load=functools.cache(load)) if weights else codec


def from_network(load: Callable[[], tuple[AutoencoderKL, Params]], scale: Scale) -> Codec:
    """Returns the codec of a network and its weights, which may be abstract shapes.

    Args:
      load: Returns the network and its weights. It is called at the first use of either.
      scale: Scale of the latents; a factor of 0 stands for the network's.
    """
    loaded = functools.cache(load)

    def latent_scale() -> Scale:
        return scale if scale.factor else Scale(loaded()[0].scaling_factor, loaded()[0].shift_factor)

    def encode(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        if "mean" in batch:
            return latent_scale().apply(_draw_cached(batch, key))
        mean, logvar = vae_model.encode(loaded()[0], params, to_float(batch["image"]))
        return latent_scale().apply(vae_model.sample_posterior(mean, logvar, key))

    def decode(params: Params, z: Array) -> Array:
        return vae_model.decode(loaded()[0], params, latent_scale().invert(z))

    return Codec(lambda: loaded()[1], encode, decode)


def external(scale: Scale, channels: int) -> Codec:
    """Returns the codec for latents of an encoder that is not part of this project.

    It decodes latents to a preview: each of the first `channels` channels, divided by 3, is a color.
    """

    def encode(params: Any, batch: Mapping[str, Array], key: Array) -> Array:
        return scale.apply(_draw_cached(batch, key))

    def decode(params: Any, z: Array) -> Array:
        preview = z[..., :channels]
        return jnp.pad(preview, [(0, 0)] * 3 + [(0, channels - preview.shape[-1])], mode="edge") / 3

    return Codec(dict, encode, decode)


def _draw_cached(batch: Mapping[str, Array], key: Array) -> Array:
    """Returns the unscaled latents of a batch: draws from their posterior, or the means if they have no variance."""
    mean = jnp.asarray(batch["mean"])
    if "logvar" not in batch:
        return mean.astype(jnp.float32)
    return vae_model.sample_posterior(mean, jnp.asarray(batch["logvar"]), key)
