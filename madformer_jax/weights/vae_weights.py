"""The VAE's weights: diffusers folders, hub repositories and Orbax folders of ours."""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax.config.identity import HUB_ID
from madformer_jax.errors import ConfigError
from madformer_jax.models.vae import AutoencoderKL, Params, abstract_params
from madformer_jax.runtime import storage
from madformer_jax.weights import state_dicts
from madformer_jax.weights.tensor_layout import from_torch, to_torch, torch_shape

_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load(path: str, dtype: str | jnp.dtype = jnp.float32) -> tuple[AutoencoderKL, Params]:
    """Model and parameters from a diffusers folder, a folder written by `save`, or a Hugging Face hub id (owner/name@revision).

    Raises:
      ConfigError: there is nothing of the kind at `path`, the hub cannot be reached, or the tensors do not fit.
    """
    model, params, _ = _load(path, dtype)
    return model, params


def save(path: str, source: str) -> None:
    """Writes the VAE at `source` (as for `load`) as an Orbax folder, config.json last.

    Raises:
      ConfigError: as for `load`; nothing is written then.
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
        config_file, *found = _locate_files(path)
        try:
            config = json.loads(config_file.read_text())
        except ValueError as error:
            raise ConfigError(f"{config_file} is no JSON ({error}).") from None
    model = from_config(config, dtype)
    if found:
        state_dict = state_dicts.read_state_dict(found[0]).tensors
        return model, from_diffusers_vae(state_dict, model, str(found[0])), config
    params = state_dicts.load_params(path)
    state_dicts.check_tensors(shapes(model), to_diffusers_vae(params), path)
    return model, params, config


def _locate_files(path: str) -> list[epath.Path]:
    """config.json and, but for an Orbax folder, the file of the weights."""
    folder = epath.Path(path)
    if folder.is_dir():
        found = [folder / name for name in _WEIGHT_FILES if (folder / name).exists()]
        if not (folder / "config.json").exists() or not (found or state_dicts.has_params(path)):
            raise ConfigError(f"{path} is no VAE folder: it needs config.json and one of {', '.join(_WEIGHT_FILES)}.")
        return [folder / "config.json", *found]
    if on_hub := HUB_ID.fullmatch(path):
        return _download(*on_hub.groups())
    raise ConfigError(f"{path}: no such folder, and no hub id either (owner/name or owner/name@revision).")


def _download(hub_id: str, revision: str | None) -> list[epath.Path]:
    """config.json and the weights of a hub repository, in the hub's own cache; the newest where no revision is given."""
    what = (
        f"VAE {hub_id!r}{f' at {revision}' if revision else ''} is no folder, and as a hub id it cannot be downloaded"
    )
    instead = "download the folder by other means and give its path"
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"{what}: pip install huggingface_hub, or {instead}.") from None
    problem: Exception | None = None
    for name in _WEIGHT_FILES:
        try:
            paths = [huggingface_hub.hf_hub_download(hub_id, file, revision=revision) for file in ("config.json", name)]
            return [epath.Path(path) for path in paths]
        except Exception as error:  # of the hub, the HTTP library below it or the system
            problem = problem or error
    reason = str(problem).strip().split("\n")[0] or type(problem).__name__
    raise ConfigError(f"{what} ({reason}): {instead}.")


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.15


def from_config(config: Mapping[str, Any], dtype: str | jnp.dtype = jnp.float32) -> AutoencoderKL:
    """The model of a diffusers config.json.

    Raises:
      ConfigError: it asks for something that the Stable Diffusion VAE does not have.
    """
    known = {
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
    for name, value in known.items():
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
    """The diffusers state_dict of `model`: name -> shape in PyTorch's layout."""
    return {
        _diffusers_name(path): torch_shape(leaf.shape) for path, leaf in flatten_dict(abstract_params(model)).items()
    }


def from_diffusers_vae(state_dict: Mapping[str, np.ndarray], model: AutoencoderKL, what: str = "VAE") -> dict[str, Any]:
    """Parameters (float32 numpy) of `model` from a diffusers state_dict, with the attention's old or new names.

    Raises:
      ConfigError: names every tensor that is missing, left over or mis-shaped; `what` names the file there.
    """
    given = {}
    for name, tensor in state_dict.items():
        head, _, kind = name.rpartition(".")
        parent, _, layer = head.rpartition(".")
        if parent.endswith("attentions.0"):
            name = f"{parent}.{_OLD_NAMES.get(layer, layer)}.{kind}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):  # older still: 1x1 convolutions
                tensor = tensor[:, :, 0, 0]
        given[name] = tensor
    state_dicts.check_tensors(shapes(model), given, what)
    paths = flatten_dict(abstract_params(model))
    return unflatten_dict({path: from_torch(np.asarray(given[_diffusers_name(path)], np.float32)) for path in paths})


def to_diffusers_vae(params: Params) -> dict[str, np.ndarray]:
    """The diffusers state_dict (new attention names) of parameters: the inverse of `from_diffusers_vae`."""
    return {_diffusers_name(path): to_torch(np.asarray(leaf)) for path, leaf in flatten_dict(params).items()}


def _diffusers_name(path: tuple[str, ...]) -> str:
    """encoder/down_blocks_0/resnets_1/conv1/kernel -> encoder.down_blocks.0.resnets.1.conv1.weight"""
    kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}[path[-1]]
    return ".".join([re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]] + [kind])
