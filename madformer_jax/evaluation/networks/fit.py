"""What the networks share that we train on a data set, `classifier` and `reader`: the size they see pictures at, how they are
trained, and their file.
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
from madformer_jax.runtime import storage
from madformer_jax.weights import state_dicts


def resize(images: Array, side: int) -> Array:
    """Images uint8 (B, H, W, c) as (B, side, side, c): bilinear, antialiased, rounded to uint8."""
    if images.shape[1:3] == (side, side):
        return images
    shape = (images.shape[0], side, side, images.shape[3])
    large = jax.image.resize(images.astype(jnp.float32), shape, "linear", precision="highest")
    return jnp.clip(jnp.round(large), 0, 255).astype(jnp.uint8)


def fit(
    params: Any,
    loss: Callable[..., Array],
    batch: Callable[[np.ndarray, int, np.random.Generator], tuple[Any, ...]],
    examples: int,
    *,
    size: int,
    steps: int,
    rate: float,
    seed: int,
    name: str,
) -> Any:
    """Parameters after so many steps of AdamW, with a warmup and a cosine decay; those given are used up.

    Args:
      loss: of parameters and what `batch` gives.
      batch: of the numbers of its examples, (size,), of the step, and of what it may draw from at random. Examples are shuffled
        anew each time all have been seen.
      examples: how many there are.
      rate: the highest learning rate.
      name: of the network, in the log.
    """
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps), weight_decay=0.05)
    state = jax.jit(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, *given: Any) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params, *given)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    random = np.random.default_rng(seed)
    for i in range(steps):
        if i % max(1, examples // size) == 0:
            order = random.permutation(examples)
        rows = order[np.arange(i * size, (i + 1) * size) % examples]
        params, state, value = step(params, state, *batch(rows, i, random))
        if (i + 1) % 500 == 0:
            logging.info("%s: step %d/%d  loss %.4f", name, i + 1, steps, value)
    return params


def save(path: str, network: Any) -> None:
    """Writes a NamedTuple of `params` and what the network knows of itself to a file (`files.SUFFIXES`)."""
    tensors = {name: np.asarray(x) for name, x in state_dicts.flatten(network.params).items()}
    state_dicts.write_state_dict(path, tensors, {name: x for name, x in network._asdict().items() if name != "params"})


def load(path: str, kind: Any, what: str, init: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `save` wrote.

    Args:
      kind: the NamedTuple.
      what: the error calls it, with what its file lacks.
      init: from that, untrained parameters; only their shapes are used.

    Raises:
      ConfigError: there is none at `path`, or it is damaged.
    """
    read = (
        state_dicts.read_npz if storage.is_remote(path) else state_dicts.read_state_dict
    )  # which copies nothing from a bucket
    tensors, args, _ = read(path)
    try:
        about = {name: (args or {})[name] for name in kind._fields if name != "params"}
    except KeyError:
        raise ConfigError(f"{path} is no {what}.") from None
    shapes = jax.eval_shape(lambda: init(about))
    try:
        return kind(params=state_dicts.unflatten(tensors, shapes, path), **about)
    except ConfigError as error:
        raise ConfigError(
            f"{error} If an earlier version wrote it, remove it: --mode=reference makes it anew."
        ) from None
