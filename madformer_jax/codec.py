"""Image to latent to blocks and back: the only place where each happens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from einops import rearrange
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config import Sizes


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
    if c.codec.name == "vae":
        from madformer_jax.models import vae  # its weights are read here, and only where they are used

        return vae.codec(c.codec.path, c.codec.dtype)
    return pixel(c.codec.patch)
