"""Conversion of weights between the authors' PyTorch release and this package.

`modes/convert.py` calls `from_release` and `to_release`. Both check that every tensor is used.
`release_config` converts the configs. A new module of the model needs an entry in `_tensor_source`.
"""

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
_TOWER = {  # our name -> the release's, in a decoder layer; {t} is the number of the tower
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
_UNET = {  # our name -> the release's, in a ResNet or attention block; norm1, conv1, norm2 and conv2 are the same
    "time": "time_emb_proj", "shortcut": "conv_shortcut",
    "norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0",
}  # fmt: skip
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class _TensorSource(NamedTuple):
    """The release's tensors from which one of our parameters is made."""

    names: tuple[str, ...]  # one tensor per layer if the parameter is stacked over layers, else one
    qkv_index: int | None  # 0, 1, 2: the third of a joint QKV matrix; None: the whole tensor
    stacked: bool


def _tensor_source(path: tuple[str, ...], depth: int, diffusion_depth: int) -> _TensorSource:
    """Returns the release's tensors from which the parameter at `path` is made."""
    if path == ("boi",):
        return _TensorSource(("boi_block",), None, False)
    leaf = _LEAF[path[-1]]
    if path[0] in ("ar_layers", "diffusion_layers"):
        ar_depth = depth - diffusion_depth
        first, count = (0, ar_depth) if path[0] == "ar_layers" else (ar_depth, diffusion_depth)
        layers = range(first, first + count - 1) if path[1] == "body" else [first + count - 1]
        name = _TOWER[path[3]].format(t=_TOWERS[path[2]])
        qkv_index = _QKV.index(path[3]) if path[3] in _QKV else None
        return _TensorSource(tuple(f"blocks.{layer}.{name}.{leaf}" for layer in layers), qkv_index, path[1] == "body")
    (sampler, module), side = path[:2], "down" if path[0] == "downsampler" else "up"
    if module in ("conv_in", "conv_out"):
        name = module
    elif module == "time":
        name = f"time_embedding.{path[2]}"
    elif match := re.fullmatch(r"(resnet|attention)_(\d+)_(\d+)", module):
        kind, stage, index = match.groups()
        name = f"{side}_blocks.{stage}.{kind}s.{index}.{_UNET.get(path[2], path[2])}"
    else:  # down_0, up_0: the convolution between two stages
        stage = module.split("_")[1]
        name = f"{side}_blocks.{stage}.{sampler}s.0.conv"
    return _TensorSource((f"{sampler}.{name}.{leaf}",), None, False)


def _to_torch(leaf: np.ndarray, name: str) -> np.ndarray:
    return leaf[None] if name == "boi_block" else to_torch(leaf)


def _from_torch(tensor: np.ndarray, name: str) -> np.ndarray:
    return tensor[0] if name == "boi_block" else from_torch(tensor)


def _layout(c: ConfigDict) -> dict[tuple[str, ...], tuple[tuple[int, ...], _TensorSource]]:
    """Returns the shape and the source of each of our parameters, by path."""
    if vocabulary_size(c) or c.model.param_sets != "separate":
        raise ConfigError(
            "the release's weights have no text tower and no shared towers: model.classes and text.vocabulary must "
            "be 0 and model.param_sets 'separate'."
        )
    return _cached_layout(c.to_json())


@functools.lru_cache(maxsize=1)  # tracing the model takes 1 to 2 s
def _cached_layout(config: str) -> dict[tuple[str, ...], tuple[tuple[int, ...], _TensorSource]]:
    model = madformer.build(ConfigDict(json.loads(config)))
    params = nn.meta.unbox(jax.eval_shape(lambda key: madformer.init(model, key), jax.random.key(0)))
    depths = model.config.depth, model.config.diffusion_depth
    return {path: (leaf.shape, _tensor_source(path, *depths)) for path, leaf in flatten_dict(params).items()}


def release_shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the release's state_dict for a config.

    Raises:
      ConfigError: The release does not have such a model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shape, source in _layout(config).values():
        for name in source.names:
            leaf = np.broadcast_to(np.float32(0), shape[1:] if source.stacked else shape)  # allocates no memory
            torch_shape = _to_torch(leaf, name).shape
            shapes[name] = torch_shape if source.qkv_index is None else (3 * torch_shape[0], *torch_shape[1:])
    return shapes


def from_release(
    state_dict: Mapping[str, np.ndarray], config: ConfigDict, origin: str = "the release's weights"
) -> dict[str, Any]:
    """Converts a state_dict of the PyTorch release to our parameters.

    The release's variant without a clean stream contains clean towers (`*_list.0.*`) that it never
    runs. They are dropped.

    Args:
      state_dict: Name -> array.
      config: Config of the model (see `release_config.preset`).
      origin: Name of the file or the model, for messages.

    Raises:
      ConfigError: Tensors are missing, unexpected or have another shape. The message names each.
    """
    if not config.model.clean_stream:
        state_dict = {name: x for name, x in state_dict.items() if "_list.0." not in name}
    state_dicts.check_tensors(release_shapes(config), state_dict, origin)

    def leaf(source: _TensorSource) -> np.ndarray:
        tensors = [np.asarray(state_dict[name], np.float32) for name in source.names]
        if source.qkv_index is not None:
            tensors = [np.split(x, 3)[source.qkv_index] for x in tensors]
        layers = [_from_torch(x, name) for x, name in zip(tensors, source.names, strict=True)]
        # Always a copy, because a single view would keep the whole mapped file in memory.
        return np.stack(layers) if source.stacked else np.array(layers[0], order="C")

    return unflatten_dict({path: leaf(source) for path, (_, source) in _layout(config).items()})


def to_release(params: Mapping[str, Any], config: ConfigDict) -> dict[str, np.ndarray]:
    """Converts our parameters to a state_dict of the release; the inverse of `from_release`.

    The release's variant without a clean stream contains clean towers that it never runs. They are
    written as copies of the noisy towers.

    Raises:
      ConfigError: The release does not have such a model, or the parameters do not fit `config`.
    """
    layout = _layout(config)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(params)).items()}
    state_dicts.check_tensors(
        {"/".join(path): shape for path, (shape, _) in layout.items()},
        {"/".join(path): leaf for path, leaf in flat.items()},
        "the parameters",
    )
    pieces: dict[str, dict[int | None, np.ndarray]] = {}  # name -> index in the QKV matrix -> tensor
    for path, (_, source) in layout.items():
        leaves = flat[path] if source.stacked else flat[path][None]
        for name, x in zip(source.names, leaves, strict=True):
            pieces.setdefault(name, {})[source.qkv_index] = _to_torch(x, name)
    state_dict = {
        name: np.ascontiguousarray(p[None] if None in p else np.concatenate([p[0], p[1], p[2]]))
        for name, p in pieces.items()
    }
    if not config.model.clean_stream:
        state_dict |= {name.replace("_list.1.", "_list.0."): x for name, x in state_dict.items() if "_list.1." in name}
    return state_dict
