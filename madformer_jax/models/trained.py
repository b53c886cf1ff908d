"""What the networks share that we train on a data set, `classifier` and `reader`: the size they see pictures at, and their file."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from madformer_jax.errors import ConfigError
from madformer_jax.weights import files


def resized(images: Array, side: int) -> Array:
    """Images uint8 (B, H, W, c) as (B, side, side, c): bilinear, antialiased, rounded to uint8."""
    if images.shape[1:3] == (side, side):
        return images
    shape = (images.shape[0], side, side, images.shape[3])
    large = jax.image.resize(images.astype(jnp.float32), shape, "linear", precision="highest")
    return jnp.clip(jnp.round(large), 0, 255).astype(jnp.uint8)


def save(path: str, network: Any) -> None:
    """Writes a NamedTuple of `params` and what the network knows of itself to a file (`files.SUFFIXES`)."""
    tensors = {name: np.asarray(x) for name, x in files.by_name(network.params).items()}
    files.write_state_dict(path, tensors, {name: x for name, x in network._asdict().items() if name != "params"})


def load(path: str, kind: Any, what: str, init: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `save` wrote.

    Args:
      kind: the NamedTuple.
      what: the error calls it, with what its file lacks.
      init: from that, untrained parameters; only their shapes are used.

    Raises:
      ConfigError: there is none at `path`, or it is damaged.
    """
    tensors, args, _ = files.read_state_dict(path)
    try:
        about = {name: (args or {})[name] for name in kind._fields if name != "params"}
    except KeyError:
        raise ConfigError(f"{path} is no {what}.") from None
    shapes = jax.eval_shape(lambda: init(about))
    try:
        return kind(params=files.as_tree(tensors, shapes, path), **about)
    except ConfigError as error:
        raise ConfigError(
            f"{error} If an earlier version wrote it, remove it: --mode=reference makes it anew."
        ) from None
