"""Training, saving and loading of small networks that judge images of a data set.

`classifier` and `attribute_classifier` share these functions. A third network that is trained on
the data set should use them too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import Array

from madformer_jax.errors import ConfigError
from madformer_jax.weights import state_dicts


@functools.partial(jax.jit, static_argnames="sizes")
def resize(images: Array, sizes: tuple[int, ...]) -> Array:
    """Resizes images uint8 (B, H, W, c) to (B, s, s, c): bilinear, antialiased, rounded.

    s is the smallest of the ascending `sizes` that the images fit in, or the last.
    """
    side = next((side for side in sizes if max(images.shape[1:3]) <= side), sizes[-1])
    if images.shape[1:3] == (side, side):
        return images
    shape = (images.shape[0], side, side, images.shape[3])
    resized = jax.image.resize(images.astype(jnp.float32), shape, "linear", precision="highest")
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def fit(
    params: Any,
    loss: Callable[..., Array],
    batch: Callable[[np.ndarray, int, np.random.Generator], tuple[Any, ...]],
    examples: int,
    *,
    size: int,
    steps: int,
    rate: float,
    name: str,
) -> Any:
    """Trains a network with AdamW, linear warmup and cosine decay.

    Args:
      params: Initial parameters. Their buffers are donated.
      loss: Computes the loss from the parameters and the arrays that `batch` returns.
      batch: Returns the arrays of a step. Its arguments are the indices of the examples, (size,),
        the step, and a random generator. Examples are shuffled again after each pass over them.
      size: Examples per step.
      rate: Peak learning rate.

    Returns:
      The trained parameters.
    """
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps), weight_decay=0.05)
    state = jax.jit(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, *arrays: Any) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params, *arrays)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    random = np.random.default_rng(0)
    for i in range(steps):
        if i % max(1, examples // size) == 0:
            order = random.permutation(examples)
        rows = order[np.arange(i * size, (i + 1) * size) % examples]
        params, state, value = step(params, state, *batch(rows, i, random))
        if (i + 1) % 500 == 0:
            logging.info("%s: step %d/%d  loss %.4f", name, i + 1, steps, value)
    return params


def save(path: str, network: Any) -> None:
    """Writes a NamedTuple of `params` and JSON metadata to a file.

    The suffix of `path` selects the format, see `state_dicts.write_state_dict`.
    """
    tensors = {name: np.asarray(x) for name, x in state_dicts.flatten(network.params).items()}
    state_dicts.write_state_dict(path, tensors, {name: x for name, x in network._asdict().items() if name != "params"})


def load(path: str, kind: Any, description: str, init: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Reads a file that `save` wrote.

    Args:
      kind: Type of the NamedTuple.
      description: Name of the file's kind and of the metadata that a wrong file lacks, for the
        error.
      init: Returns untrained parameters for the metadata. Only their shapes are used.

    Raises:
      ConfigError: The file is missing or damaged, or has no metadata.
    """
    tensors, args, _ = state_dicts.read_state_dict(path)
    try:
        metadata = {name: (args or {})[name] for name in kind._fields if name != "params"}
    except KeyError:
        raise ConfigError(f"{path} is not a {description}.") from None
    shapes = jax.eval_shape(lambda: init(metadata))
    return kind(params=state_dicts.unflatten(tensors, shapes, path), **metadata)
