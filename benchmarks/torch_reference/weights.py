"""Conversion of our parameters to a state dict of the yardstick."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict

from madformer_jax.weights.tensor_layout import to_torch

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "embedding": "weight"}
_JOINED = {"query": ("qkv", 0), "key": ("qkv", 1), "value": ("qkv", 2), "gate": ("gate_up", 0), "up": ("gate_up", 1)}


def state_dict(params: Mapping[str, Any], depth: int, diffusion_depth: int) -> dict[str, torch.Tensor]:
    """Converts our parameters, or gradients of the same structure, of a model with `depth` layers."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, array in flatten_dict(params).items():
        if path[0] == "text_head":  # the yardstick has no text term
            continue
        if path[0] in ("ar_layers", "diffusion_layers"):
            first = 0 if path[0] == "ar_layers" else depth - diffusion_depth
            end = depth - diffusion_depth if path[0] == "ar_layers" else depth
            layers = enumerate(array, first) if path[1] == "body" else [(end - 1, array)]
            tower = path[2].removeprefix("tower_")
            tensors = [(f"layers.{n}.towers.{tower}", path[3:], x) for n, x in layers]
        elif path[0] in ("downsampler", "upsampler"):
            tensors = [(f"{path[0]}.{_unet_module(path[1])}", path[2:], array)]
        else:
            tensors = [("", path, array)]
        for prefix, names, x in tensors:
            name, index = _tensor_name(prefix, names)
            value = np.asarray(x)
            parts.setdefault(name, {})[index] = value if path[0] in ("boi", "embedding") else to_torch(value)
    return {name: torch.tensor(np.concatenate([x[n] for n in sorted(x)])) for name, x in parts.items()}


def _unet_module(name: str) -> str:
    """Returns the yardstick's name of a module of the U-Net."""
    if match := re.fullmatch(r"(resnet|attention)_(\d+)_(\d+)", name):
        return f"stages.{match[2]}.{match[3]}.{int(match[1] == 'attention')}"
    return re.sub(r"(down|up)_(\d+)", r"between.\2", name)


def _tensor_name(prefix: str, names: tuple[str, ...]) -> tuple[str, int]:
    """Returns the name of a tensor, and the index of the part of it that our parameter is."""
    *modules, leaf = names
    joined, index = _JOINED.get(modules[-1], (modules[-1], 0)) if modules else ("", 0)
    path = [prefix, *modules[:-1], joined, _LEAVES.get(leaf, leaf)]
    return ".".join(x for x in path if x), index
