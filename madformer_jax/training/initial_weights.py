"""The weights that a new run starts from: those of `train.init_from` that fit.

A model with another number of classes, other blocks or other channels takes the arrays that have
the same name and shape, and logs every other one. `modes.train` calls `load` for a run without a
checkpoint.
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.training.train_step import State


def load(c: ConfigDict, state: State) -> State:
    """Replaces the parameters and the EMA of a new state by the weights of `train.init_from`.

    `power_ema` stays, because its first update replaces it.

    The weights are the averages that `init_from` holds, or its parameters if it has no averages.

    Raises:
      ConfigError: The folder has no weights, or none fits the model.
    """
    source = c.train.init_from
    try:
        checkpoint.require(source)
        for difference in checkpoint.resume_conflicts(c, source, checkpoint.MODEL_FIELDS):
            logging.warning("init_from: the weights are of another model: %s", difference)
        with checkpoint.Checkpoints(source, read_only=True) as checkpoints:
            item = "ema" if checkpoints.abstract_tree("ema") else "params"
            step, trees, _ = checkpoints.restore({item: _restore_target(checkpoints.abstract_tree(item), state.params)})
        saved, current = _named_arrays(trees[item]), _named_arrays(state.params)
        fitting = {name for name in saved.keys() & current.keys() if saved[name].shape == current[name].shape}
        if not fitting:
            raise ConfigError(f"no array of {source} has the name and the shape of an array of the model.")
    except ConfigError as error:
        raise ConfigError(f"config.train.init_from: {error}") from error
    for name in sorted((saved.keys() | current.keys()) - fitting):
        shapes = [str(arrays[name].shape) if name in arrays else "no array" for arrays in (saved, current)]
        logging.warning("init_from: %s does not fit: %s in the weights, %s in the model", name, *shapes)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: saved[_name(path)] if _name(path) in fitting else x, state.params
    )
    logging.info("starting from the %s of step %d of %s: %d arrays fit", item, step, source, len(fitting))
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))


def _restore_target(metadata: Any, params: Any) -> Any:
    """Returns the shapes of a stored tree with the shardings of the model's arrays.

    Arrays that do not fit are replicated, since they are only dropped.
    """
    current = _named_arrays(params)
    replicated = partitioning.replicated(next(iter(current.values())).sharding.mesh)

    def abstract(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        shape, like = tuple(x.shape), current.get(_name(path))
        sharding = replicated if like is None or like.shape != shape else like.sharding
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(abstract, metadata)


def _named_arrays(tree: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
