"""Weights of the VAE: reading diffusers folders, hub repositories and our Orbax folders.

`sampling/codec.py` calls `load`, and `modes/convert.py` calls `save`. The model itself is in
`models/vae.py`. Settings of a diffusers config that it supports are checked in `from_config`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax.config.table import HUB_ID
from madformer_jax.errors import ConfigError
from madformer_jax.models.vae import AutoencoderKL, Params, abstract_params
from madformer_jax.runtime import storage
from madformer_jax.weights import state_dicts
from madformer_jax.weights.tensor_layout import from_torch, to_torch, torch_shape

_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load(path: str, dtype: str | jnp.dtype = jnp.float32) -> tuple[AutoencoderKL, Params]:
    """Loads the VAE.

    Args:
      path: A diffusers folder, a folder written by `save`, or a Hugging Face hub id (owner/name or
        owner/name@revision).
      dtype: Type in which the model computes.

    Returns:
      The model and its parameters.

    Raises:
      ConfigError: `path` is none of these, the hub cannot be reached, or the tensors do not fit.
    """
    model, params, _ = _load(path, dtype)
    return model, params


def save(path: str, source: str) -> None:
    """Writes a VAE as an Orbax folder, config.json last.

    Args:
      path: Folder to write.
      source: The VAE to read; see `load`.

    Raises:
      ConfigError: The VAE cannot be loaded (see `load`). Nothing is written in this case.
    """
    _, params, config = _load(source, jnp.float32)
    state_dicts.save_params(path, params)
    storage.write_json(epath.Path(path) / "config.json", config)


def _load(path: str, dtype: str | jnp.dtype) -> tuple[AutoencoderKL, Params, dict[str, Any]]:
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
    model = from_config(config, dtype)
    if weight_files:
        state_dict = state_dicts.read_state_dict(weight_files[0]).tensors
        return model, from_diffusers_vae(state_dict, model, str(weight_files[0])), config
    params = state_dicts.load_params(path)
    state_dicts.check_tensors(shapes(model), to_diffusers_vae(params), path)
    return model, params, config


def _locate_files(path: str) -> list[epath.Path]:
    """Returns the paths of config.json and, except for an Orbax folder, of the weights."""
    folder = epath.Path(path)
    if folder.is_dir():
        weight_files = [folder / name for name in _WEIGHT_FILES if (folder / name).exists()]
        if not (folder / "config.json").exists() or not (weight_files or state_dicts.has_params(path)):
            raise ConfigError(
                f"{path} is not a VAE folder: it needs config.json and one of {', '.join(_WEIGHT_FILES)}."
            )
        return [folder / "config.json", *weight_files]
    if match := HUB_ID.fullmatch(path):
        return _download(*match.groups())
    raise ConfigError(f"{path} is neither a folder nor a hub id (owner/name or owner/name@revision).")


def _download(hub_id: str, revision: str | None) -> list[epath.Path]:
    """Downloads config.json and the weights of a hub repository to the hub's own cache.

    Args:
      hub_id: Repository, owner/name.
      revision: Revision; None for the newest.
    """
    message = (
        f"VAE {hub_id!r}{f' at {revision}' if revision else ''} is not a folder, and as a hub id it cannot be "
        "downloaded"
    )
    remedy = "download the folder by other means and give its path"
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"{message}: pip install huggingface_hub, or {remedy}.") from None
    problem: Exception | None = None
    for name in _WEIGHT_FILES:
        try:
            paths = [huggingface_hub.hf_hub_download(hub_id, file, revision=revision) for file in ("config.json", name)]
            return [epath.Path(path) for path in paths]
        except Exception as error:  # the hub, its HTTP library and the system raise their own types
            problem = problem or error
    reason = str(problem).strip().split("\n")[0] or type(problem).__name__
    raise ConfigError(f"{message} ({reason}): {remedy}.")


# Names of attention layers in diffusers before 0.15 -> their names since.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_config(config: Mapping[str, Any], dtype: str | jnp.dtype = jnp.float32) -> AutoencoderKL:
    """Builds the model of a diffusers config.json.

    Raises:
      ConfigError: The config requires a feature that the Stable Diffusion VAE does not have.
    """
    supported = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(config.get("block_out_channels", (0,) * 4)),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.get("block_out_channels", (0,) * 4)),
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }
    for name, value in supported.items():
        if name in config and config[name] != value:
            raise ConfigError(f"VAE config {name}={config[name]!r} is not supported: only {value!r}.")
    fields = [
        name
        for name in AutoencoderKL.__dataclass_fields__
        if name in config and name not in ("dtype", "name", "parent")
    ]
    values = {name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in fields}
    return AutoencoderKL(**values, dtype=jnp.dtype(dtype))


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
    kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}[path[-1]]
    return ".".join([re.sub(r"_(\d+)$", r".\1", name) for name in path[:-1]] + [kind])
