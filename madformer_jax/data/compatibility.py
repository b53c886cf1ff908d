"""Checks that prepared records and latents fit the config that is about to train on them.

`pipeline.dataset_info` calls them.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError


def check_latents(config: ConfigDict, shape: tuple[int, ...]) -> None:
    """Checks that latents of a shape (h, w, C) fit the config; () stands for an unknown shape.

    Raises:
      ConfigError: The codec has no latents, they have another shape, or they would have to be flipped.
    """
    if config.codec.name == "pixel":
        raise ConfigError(
            f"config.codec.name='pixel', but config.data.path={config.data.path!r} holds latents: set "
            "config.codec.name=vae, or external to sample latents."
        )
    if config.data.flip:
        raise ConfigError(
            "config.data.flip=True: latents cannot be flipped; use --mode=prepare --config.prepare.flip=True."
        )
    sizes = derive_sizes(config)
    if shape and shape != (sizes.latent, sizes.latent, sizes.channels):
        raise ConfigError(
            f"config.data.path={config.data.path!r} holds latents of {' x '.join(map(str, shape))} values, and the model takes "
            f"{sizes.latent} x {sizes.latent} x {sizes.channels}: set config.codec.latent_channels, config.codec.downsampling "
            "and config.data.image_size."
        )


def check_manifest(manifest: Mapping[str, Any], config: ConfigDict, preprocessor: preprocess.Preprocessor) -> None:
    """Checks that prepared records fit the config that is about to train on them.

    Raises:
      ConfigError: The records were prepared with other settings than those of `config`.
    """
    wanted, path = preprocessor.describe(), config.data.path
    for field, value in manifest["image"].items():
        if wanted.get(field) != value:
            name = {"size": "image_size"}.get(field, field)
            raise ConfigError(
                f"config.data.{name}={wanted.get(field)!r}, but the records of config.data.path={path!r} "
                f"were prepared with {value!r}: set the same, or prepare again."
            )
    if manifest["kind"] == "images":
        return
    check_latents(config, tuple(manifest["shape"]))
    facts = manifest["codec"]
    if config.codec.scaling_factor:
        for name in ("scaling_factor", "shift_factor"):
            factor = facts.get(name, 0.0)
            if not math.isclose(factor, config.codec[name]):
                raise ConfigError(
                    f"config.codec.{name}={config.codec[name]}, but the latents of config.data.path={path!r} come from a VAE "
                    f"with {factor}: set config.codec.{name}={factor}."
                )
