"""The release's weights to ours and back, every tensor accounted for."""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from madformer_jax.config.shapes import vocabulary_size
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.weights import state_dicts
from madformer_jax.weights.tensor_layout import from_torch, to_torch

_TOWERS = {"tower_clean": 0, "tower_pred": 1}
_TOWER = {  # ours -> the release's, in a decoder layer; {t} is the number of the tower
    "attention_norm": "input_layernorm_list.{t}",
    "query": "self_attn.qkv_list.{t}",  # the release holds query, key and value as one matrix
    "key": "self_attn.qkv_list.{t}",
    "value": "self_attn.qkv_list.{t}",
    "query_norm": "self_attn.q_norm_list.{t}",
    "key_norm": "self_attn.k_norm_list.{t}",
    "out": "self_attn.proj_list.{t}",
    "mlp_norm": "post_attention_layernorm_list.{t}",
    "gate": "mlp_list.{t}.gate_proj",
    "up": "mlp_list.{t}.up_proj",
    "down": "mlp_list.{t}.down_proj",
}
_QKV = ("query", "key", "value")
_UNET = {  # ours -> the release's, in a ResNet or attention block
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class _TensorSource(NamedTuple):
    """Where one of our leaves comes from: a tensor for each layer it is stacked over, and which third of it."""

    names: tuple[str, ...]
    part: int | None  # 0, 1, 2: query, key, value of a joint matrix; None: all of it
    stacked: bool


def _tensor_source(path: tuple[str, ...], shape: tuple[int, ...], depth: int, diffusion_depth: int) -> _TensorSource:
    """The release's tensors behind the leaf at `path` of our parameters."""
    if path == ("boi",):
        return _TensorSource(("boi_block",), None, False)
    leaf = _LEAF[path[-1]]
    if path[0] in ("ar_layers", "diffusion_layers"):
        first, count = (
            (0, depth - diffusion_depth) if path[0] == "ar_layers" else (depth - diffusion_depth, diffusion_depth)
        )
        layers = range(first, first + count - 1) if path[1] == "body" else [first + count - 1]
        name = _TOWER[path[3]].format(t=_TOWERS[path[2]])
        part = _QKV.index(path[3]) if path[3] in _QKV else None
        return _TensorSource(tuple(f"blocks.{layer}.{name}.{leaf}" for layer in layers), part, path[1] == "body")
    sampler, side = path[0], "down" if path[0] == "downsampler" else "up"
    module = path[1]
    if module in ("conv_in", "conv_out"):
        name = module
    elif module == "time":
        name = f"time_embedding.{path[2]}"
    elif match := re.fullmatch(r"(resnet|attention)_(\d+)_(\d+)", module):
        kind, stage, index = match.groups()
        name = f"{side}_blocks.{stage}.{kind}s.{index}.{_UNET[path[2]]}"
    else:  # down_0, up_0: the convolution between two stages
        stage = module.split("_")[1]
        name = f"{side}_blocks.{stage}.{sampler}s.0.conv"
    return _TensorSource((f"{sampler}.{name}.{leaf}",), None, False)


def _to_torch(leaf: np.ndarray, name: str) -> np.ndarray:
    return leaf[None] if name == "boi_block" else to_torch(leaf)


def _from_torch(tensor: np.ndarray, name: str) -> np.ndarray:
    return tensor[0] if name == "boi_block" else from_torch(tensor)


def _layout(c: ConfigDict) -> dict[tuple[str, ...], tuple[tuple[int, ...], _TensorSource]]:
    """Our parameters' paths with their shapes and sources.

    Raises:
      ConfigError: the release has no such model.
    """
    if vocabulary_size(c) or c.model.param_sets != "separate":
        raise ConfigError(
            "the release's weights have no text tower and no shared towers: model.classes and text.vocabulary must be 0 and "
            "model.param_sets 'separate'."
        )
    return _cached_layout(c.to_json())


@functools.lru_cache(maxsize=1)  # tracing the model takes a second or two
def _cached_layout(config: str) -> dict[tuple[str, ...], tuple[tuple[int, ...], _TensorSource]]:
    model = madformer.build(ConfigDict(json.loads(config)))
    params = nn.meta.unbox(jax.eval_shape(lambda key: madformer.init(model, key), jax.random.key(0)))
    depths = model.depth, model.diffusion_depth
    return {
        path: (leaf.shape, _tensor_source(path, leaf.shape, *depths)) for path, leaf in flatten_dict(params).items()
    }


def _expected_shapes(
    layout: Mapping[tuple[str, ...], tuple[tuple[int, ...], _TensorSource]],
) -> dict[str, tuple[int, ...]]:
    """The release's names and shapes of a layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shape, source in layout.values():
        for name in source.names:
            leaf = np.broadcast_to(np.float32(0), shape[1:] if source.stacked else shape)  # no memory behind it
            torch_shape = _to_torch(leaf, name).shape
            shapes[name] = torch_shape if source.part is None else (3 * torch_shape[0], *torch_shape[1:])
    return shapes


def release_shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release's state_dict for a config.

    Raises:
      ConfigError: the release has no such model.
    """
    return _expected_shapes(_layout(config))


def from_release(
    state_dict: Mapping[str, np.ndarray], config: ConfigDict, what: str = "the release's weights"
) -> dict[str, Any]:
    """Parameters for `config` (see `release_config.preset`) from a state_dict of the PyTorch release, name -> array.

    Without the clean stream the clean towers (`*_list.0.*`), which that variant of the release carries but never runs,
    are left out.

    Raises:
      ConfigError: tensors are missing, left over or of another shape; each is named, with `what` before them.
    """
    layout = _layout(config)
    if not config.model.clean_stream:
        state_dict = {name: x for name, x in state_dict.items() if "_list.0." not in name}
    state_dicts.check_tensors(_expected_shapes(layout), state_dict, what)

    def leaf(source: _TensorSource) -> np.ndarray:
        tensors = [np.asarray(state_dict[name], np.float32) for name in source.names]
        if source.part is not None:
            tensors = [np.split(x, 3)[source.part] for x in tensors]
        parts = [_from_torch(x, name) for x, name in zip(tensors, source.names, strict=True)]
        # always a copy: one view would keep the whole mapped file in memory
        return np.stack(parts) if source.stacked else np.array(parts[0], order="C")

    return unflatten_dict({path: leaf(source) for path, (_, source) in layout.items()})


def to_release(params: Mapping[str, Any], config: ConfigDict) -> dict[str, np.ndarray]:
    """The release's state_dict for parameters of `config`; the inverse of `from_release`.

    Without the clean stream the clean towers, which that variant never runs, are written as copies of the noisy ones.

    Raises:
      ConfigError: the release has no such model, or the parameters are not those of `config`.
    """
    layout = _layout(config)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(params)).items()}
    state_dicts.check_tensors(
        {"/".join(path): shape for path, (shape, _) in layout.items()},
        {"/".join(path): leaf for path, leaf in flat.items()},
        "the parameters",
    )
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for path, (_, source) in layout.items():
        leaves = flat[path] if source.stacked else flat[path][None]
        for name, x in zip(source.names, leaves, strict=True):
            parts.setdefault(name, {})[source.part] = _to_torch(x, name)
    state_dict = {
        name: np.ascontiguousarray(p[None] if None in p else np.concatenate([p[0], p[1], p[2]]))
        for name, p in parts.items()
    }
    if not config.model.clean_stream:
        state_dict |= {name.replace("_list.1.", "_list.0."): x for name, x in state_dict.items() if "_list.1." in name}
    return state_dict
