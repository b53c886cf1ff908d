"""Conversion between configs and the training arguments of the authors' PyTorch release.

`modes/convert.py` calls `infer_config` to derive a config from a checkpoint of the release, and
`release_args` to write arguments for the release's scripts. If the release's behavior differs from
our default, set its choice in `as_release`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config.schema import base
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.errors import ConfigError, first_line

_MODEL_FIELDS = {  # field of config.model -> the release's argument
    "width": "hidden_size", "heads": "num_heads", "depth": "depth", "diffusion_depth": "diff_depth",
    "mlp_width": "intermediate_size", "blocks": "ar_len", "unet_groups": "unet_resnet_groups",
    "unet_heads": "unet_num_heads", "unet_time_width": "unet_time_emb_dim",
}  # fmt: skip


def preset(meta: dict[str, Any]) -> ConfigDict:
    """Builds a config from the release's arguments.

    The codec is `pixel` with patch 1, so that `data.image_size` is the side of the latent. Set
    `codec` and `data` to use images.

    Args:
      meta: The release's arguments: the JSON beside the reference arrays, or the `args` namespace
        of a release checkpoint as a dict. Sizes: hidden_size, num_heads, depth, diff_depth,
        intermediate_size, unet_block_out_channels, unet_num_layers_per_block,
        unet_transformer_layers_per_block, unet_resnet_groups, unet_num_heads, unet_time_emb_dim,
        block_size, pre_downsample_block_size, ar_len. Optional: latent_channels, lambda_hidden, and
        the variant, as `variant` = baseline | clear_clean | clear_cond | denoising_mlp or as
        boolean fields of those names.

    Raises:
      ConfigError: A size is missing or no number, the variant is unknown, or the U-Net has stages of
        unequal length.
    """

    def variant(name: str) -> bool:
        return meta.get("variant") == name or bool(meta.get(name, False))

    known = ("baseline", "clear_clean", "clear_cond", "denoising_mlp")
    if meta.get("variant", "baseline") not in known:
        raise ConfigError(f"release variant {meta['variant']!r} is unknown: one of {', '.join(known)}.")
    c = base()
    try:
        positions, tokens = int(meta["pre_downsample_block_size"]), int(meta["block_size"])
        layers = tuple(meta["unet_num_layers_per_block"])
        for field, name in _MODEL_FIELDS.items():
            c.model[field] = meta[name]
        c.model.unet_channels = tuple(meta["unet_block_out_channels"])
        c.model.unet_attention = tuple(bool(n) for n in meta["unet_transformer_layers_per_block"])
        c.data.channels = meta.get("latent_channels", 4)
        c.data.image_size = math.isqrt(positions * c.model.blocks)
        lambda_hidden = float(meta.get("lambda_hidden", 0.1))
    except KeyError as error:
        raise ConfigError(f"the release's arguments lack {error.args[0]!r}.") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the release's arguments have a wrong value ({first_line(error)}).") from None
    if len(set(layers)) != 1:
        raise ConfigError(f"unet_num_layers_per_block={list(layers)}: stages of unequal length are not supported.")
    c.model.unet_layers = layers[0]
    stages = len(c.model.unet_channels)
    c.model.unet_stride = 1 if positions == tokens or stages == 1 else 2
    as_release(c)
    c.model.clean_stream = not variant("clear_clean")
    c.model.ar_condition = not variant("clear_cond")
    c.model.diffusion_attention = "block" if variant("denoising_mlp") else "sequence"
    # Without the AR condition the release's hidden loss is 0, whatever its weight.
    c.loss.hidden = lambda_hidden if c.model.ar_condition else 0.0
    c.codec.name, c.codec.patch = "pixel", 1
    return c


def as_release(c: ConfigDict) -> None:
    """Replaces defaults that differ from the release by the release's choices."""
    c.model.rope = "release"
    c.model.time_embedding = "raw"
    c.model.clean_timestep = "noisy"
    # The release's condition is a view into the stream, to which it adds the noisy blocks in place.
    c.model.hidden_from = "noisy"
    c.train.ema_warmup = False
    c.sample.weights = "raw"
    c.sample.spacing = "leading"
    c.sample.steps = 250


# The revision is pinned, so that the weights never change.
RELEASE_VAE = "stabilityai/sd-vae-ft-mse@31f26fdeee1355a5c34592e401dd41e45d25a493"


def infer_config(tensors: Mapping[str, np.ndarray], args: Mapping[str, Any], codec_path: str = "") -> ConfigDict:
    """Derives the config of a release checkpoint.

    The model is for images, encoded by a VAE, if `args` contains `image_size` or `codec_path` is
    given. Otherwise it is for latents.

    Args:
      tensors: State_dict of the checkpoint. The sizes that the release reads from a JSON file are
        inferred from the shapes.
      args: Training arguments of the checkpoint.
      codec_path: Path of the VAE; "" uses `RELEASE_VAE`.

    Raises:
      ConfigError: A tensor or an argument is missing, or the model is not supported.
    """
    if args.get("patch_size", 1) != 1 or not args.get("square_block", True):
        raise ConfigError("the release's arguments have patch_size other than 1 or square_block=False: not supported.")
    renamed = {"lambda_hidden_loss": "lambda_hidden", "vae_latent_size": "latent_channels"}
    try:
        sizes = _infer_sizes(tensors)
    except KeyError as error:
        raise ConfigError(f"not a checkpoint of the release: tensor {error.args[0]} is missing.") from None
    c = preset(sizes | {renamed.get(name, name): value for name, value in args.items()})
    if codec_path or "image_size" in args:
        c.codec.name, c.codec.path = "vae", codec_path or RELEASE_VAE
        c.codec.latent_channels = c.data.channels
        c.data.image_size, c.data.channels = c.data.image_size * c.codec.downsampling, 3
    return c


def _infer_sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Infers the release's sizes from the shapes of its tensors.

    Shapes do not contain the numbers of groups and heads of the U-Net, which are those of the
    release.
    """

    def count(pattern: str) -> int:
        return len({match[0] for name in tensors if (match := re.match(pattern, name))})

    stages = range(count(r"downsampler\.down_blocks\.\d+\."))
    stage = "downsampler.down_blocks"
    width = tensors["boi_block"].shape[-1]
    return {
        "hidden_size": width,
        "num_heads": width // tensors["blocks.0.self_attn.q_norm_list.1.weight"].shape[0],
        "depth": count(r"blocks\.\d+\."),
        "intermediate_size": tensors["blocks.0.mlp_list.1.gate_proj.weight"].shape[0],
        "unet_block_out_channels": [tensors[f"{stage}.{i}.resnets.0.conv1.weight"].shape[0] for i in stages],
        "unet_num_layers_per_block": [count(rf"downsampler\.down_blocks\.{i}\.resnets\.\d+\.") for i in stages],
        "unet_transformer_layers_per_block": [
            min(1, count(rf"downsampler\.down_blocks\.{i}\.attentions\.\d+\.")) for i in stages
        ],
        "unet_time_emb_dim": tensors["downsampler.time_embedding.linear_1.weight"].shape[0],
        "unet_resnet_groups": 8,
        "unet_num_heads": 8,
        "latent_channels": tensors["downsampler.conv_in.weight"].shape[1],
    }


def release_args(c: ConfigDict) -> dict[str, Any]:
    """Returns the release's arguments for a config: the inverse of `preset`.

    The result also contains the further arguments that the release's scripts read.

    Raises:
      ConfigError: The release does not have such a model. The message names the settings that
        differ.
    """
    m, sizes = c.model, derive_sizes(c)
    stages = len(m.unet_channels)
    args = {
        **{name: m[field] for field, name in _MODEL_FIELDS.items()},
        "unet_block_out_channels": list(m.unet_channels),
        "unet_num_layers_per_block": [m.unet_layers] * stages,
        "unet_transformer_layers_per_block": [int(attention) for attention in m.unet_attention],
        "block_size": sizes.tokens,
        "pre_downsample_block_size": sizes.positions,
        "spatial_len": sizes.blocks * sizes.tokens,
        "latent_channels": sizes.channels,
        "vae_latent_size": sizes.channels,
        "patch_size": 1,
        "square_block": True,
        "clear_clean": not m.clean_stream,
        "clear_cond": not m.ar_condition,
        "denoising_mlp": m.diffusion_attention == "block",
        "lambda_hidden": c.loss.hidden,
        "lambda_hidden_loss": c.loss.hidden,
        "model_config_path": None,
    } | ({"image_size": c.data.image_size} if c.codec.name == "vae" else {})
    # Settings of computation or training, which do not change the exported model.
    ignored = {"attention", "dtype", "remat", "scan_unroll", "hidden_from"}
    ignored |= {"unet_stride"} if stages == 1 else set()  # the stride between two stages
    release = preset(args)
    different = [
        f"{section}.{name}={c[section][name]!r} (release: {release[section][name]!r})"
        for section in ("model", "diffusion")
        for name in sorted(c[section])
        if name not in ignored and c[section][name] != release[section][name]
    ]
    if different:
        raise ConfigError(f"the release's code cannot run this model: {', '.join(different)}.")
    return args
