"""Weights of the VAE: reading diffusers folders, hub repositories and our Orbax folders.

`sampling/codec.py` calls `load`, and `modes/convert.py` calls `save`. The model itself is in
`models/vae.py`. Settings of a diffusers config that it supports are checked in `from_config`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax.config.table import HUB_ID
from madformer_jax.errors import ConfigError
from madformer_jax.models.layers import Params
from madformer_jax.models.vae import AutoencoderKL, abstract_params
from madformer_jax.runtime import storage
from madformer_jax.weights import hub, state_dicts
from madformer_jax.weights.tensor_layout import from_torch, to_torch, torch_shape

_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_PIPELINE_FOLDER = "vae"  # the VAE's folder in a diffusers pipeline


def load(path: str, dtype: str | jnp.dtype = jnp.float32) -> tuple[AutoencoderKL, Params]:
    """Loads the VAE.

    Args:
      path: A diffusers folder of a VAE or of a pipeline, a folder written by `save`, or a Hugging
        Face hub id of one (owner/name or owner/name@revision).
      dtype: Type in which the model computes.

    Returns:
      The model and its parameters.

    Raises:
      ConfigError: `path` is none of these, the hub cannot be reached, or the tensors do not fit.
    """
    model, params, _ = _load(path, dtype)
    return model, params


def load_config(path: str) -> AutoencoderKL:
    """Loads the model without its parameters; see `load`."""
    return from_config(_read_config(path)[0])


def save(path: str, source: str) -> None:
    """Writes the VAE that `load` reads from `source` as an Orbax folder, config.json last.

    Raises:
      ConfigError: The VAE cannot be loaded. Nothing is written in this case.
    """
    _, params, config = _load(source, jnp.float32)
    state_dicts.save_params(path, params)
    storage.write_json(epath.Path(path) / "config.json", config)


def _load(path: str, dtype: str | jnp.dtype) -> tuple[AutoencoderKL, Params, dict[str, Any]]:
    config, folder, weight_files = _read_config(path)
    model = from_config(config, dtype)
    if weight_files:
        state_dict = state_dicts.read_state_dict(weight_files[0]).tensors
        return model, from_diffusers_vae(state_dict, model, str(weight_files[0])), config
    params = state_dicts.load_params(folder)
    state_dicts.check_tensors(shapes(model), to_diffusers_vae(params), path)
    return model, params, config


def _read_config(path: str) -> tuple[dict[str, Any], epath.Path, list[epath.Path]]:
    """Returns the content of config.json, its folder, and the files of the weights."""
    if not path:
        raise ConfigError(
            "config.codec.path is empty: give the VAE's folder or hub id (such as stabilityai/sd-vae-ft-mse, or with @revision)."
        )
    with storage.wrap_errors(f"config.codec.path={path} cannot be read"):
        config_file, *weight_files = _locate_files(path)
        try:
            config = json.loads(config_file.read_text())
        except ValueError as error:
            raise ConfigError(f"{config_file} is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{config_file} is not the config of a VAE: it holds no JSON object.")
    return config, config_file.parent, weight_files


def _locate_files(path: str) -> list[epath.Path]:
    """Returns the paths of config.json and, except for an Orbax folder, of the weights."""
    folders = [epath.Path(path), epath.Path(path) / _PIPELINE_FOLDER]
    for folder in folders:
        weight_files = [folder / name for name in _WEIGHT_FILES if (folder / name).exists()]
        if (folder / "config.json").exists() and (weight_files or state_dicts.has_params(folder)):
            return [folder / "config.json", *weight_files]
    if folders[0].is_dir():
        raise ConfigError(f"{path} is not a VAE folder: it needs config.json and one of {', '.join(_WEIGHT_FILES)}.")
    if match := HUB_ID.fullmatch(path):
        choices = [
            (f"{prefix}config.json", f"{prefix}{name}")
            for prefix in ("", f"{_PIPELINE_FOLDER}/")
            for name in _WEIGHT_FILES
        ]
        return hub.download(
            f"config.codec.path={path!r} is not a folder, and as a hub id it", match[1], match[2], choices
        )
    raise ConfigError(f"{path} is neither a folder nor a hub id (owner/name or owner/name@revision).")


# Names of attention layers in diffusers before 0.15 -> their names since.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_config(config: Mapping[str, Any], dtype: str | jnp.dtype = jnp.float32) -> AutoencoderKL:
    """Builds the model of a diffusers config.json. Missing fields are those of Stable Diffusion.

    Raises:
      ConfigError: A field has a wrong value, or one that `AutoencoderKL` does not support. The message
        names it.
    """
    stored = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if x is not None}
    values = {name: stored.get(name, default) for name, default in _FIELDS.items()}
    for name, default in _FIELDS.items():
        _check_field(name, values[name], default)
    model = AutoencoderKL(**values, dtype=jnp.dtype(dtype))
    stages, groups = len(model.block_out_channels), model.norm_num_groups
    supported = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
        "latents_mean": None,
        "latents_std": None,
    }
    for name, value in supported.items():
        if stored.get(name, value) != value:
            raise ConfigError(f"VAE config {name}={config[name]!r} is not supported: only {value!r}.")
    if any(channels % groups for channels in model.block_out_channels):
        raise ConfigError(
            f"VAE config block_out_channels={list(model.block_out_channels)} must be multiples of norm_num_groups={groups}."
        )
    return model


# Fields of config.json that `AutoencoderKL` has, with the defaults of Stable Diffusion
_FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(AutoencoderKL)
    if field.name not in ("dtype", "name", "parent")
}


def _check_field(name: str, value: Any, default: Any) -> None:
    """Checks that a field has the type of its default and is positive, except for `shift_factor`."""
    kinds = {bool: "true or false", int: "a positive integer", float: "a positive number", tuple: "positive integers"}
    if isinstance(default, tuple):
        valid = isinstance(value, tuple) and value and all(type(x) is int and x > 0 for x in value)
    elif isinstance(default, float):
        valid = type(value) in (int, float) and math.isfinite(value) and (value > 0 or name == "shift_factor")
    else:
        valid = type(value) is type(default) and (value > 0 or isinstance(default, bool))
    if not valid:
        raise ConfigError(f"VAE config {name}={value!r} is wrong: it must be {kinds[type(default)]}.")


def shapes(model: AutoencoderKL) -> dict[str, tuple[int, ...]]:
    """Returns the diffusers state_dict of `model` as name -> shape, in PyTorch's layout."""
    return {
        _diffusers_name(path): torch_shape(leaf.shape) for path, leaf in flatten_dict(abstract_params(model)).items()
    }


def from_diffusers_vae(
    state_dict: Mapping[str, np.ndarray], model: AutoencoderKL, origin: str = "VAE"
) -> dict[str, Any]:
    """Converts a diffusers state_dict to parameters of `model` (float32 numpy).

    Args:
      state_dict: Name -> array, with the old or the new names of attention layers.
      model: The model.
      origin: Name of the file, for messages.

    Raises:
      ConfigError: A tensor is missing, unexpected or mis-shaped. The message names each.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        head, _, kind = name.rpartition(".")
        parent, _, layer = head.rpartition(".")
        if parent.endswith("attentions.0"):
            name = f"{parent}.{_OLD_NAMES.get(layer, layer)}.{kind}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):  # still older files have 1 x 1 convolutions
                tensor = tensor[:, :, 0, 0]
        tensors[name] = tensor
    state_dicts.check_tensors(shapes(model), tensors, origin)
    paths = flatten_dict(abstract_params(model))
    return unflatten_dict({path: from_torch(np.asarray(tensors[_diffusers_name(path)], np.float32)) for path in paths})


def to_diffusers_vae(params: Params) -> dict[str, np.ndarray]:
    """Converts parameters to a diffusers state_dict; the inverse of `from_diffusers_vae`.

    Attention layers get their new names.
    """
    return {_diffusers_name(path): to_torch(np.asarray(leaf)) for path, leaf in flatten_dict(params).items()}


def _diffusers_name(path: tuple[str, ...]) -> str:
    """Returns the diffusers name of a parameter.

    Example: encoder/down_blocks_0/resnets_1/conv1/kernel ->
      encoder.down_blocks.0.resnets.1.conv1.weight
    """
    kind = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
    return ".".join([re.sub(r"_(\d+)$", r".\1", name) for name in path[:-1]] + [kind])
