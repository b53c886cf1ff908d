"""A loop over layers of one kind, whose gradient keeps what it needs in memory that nothing fills beforehand.

`jax.lax.scan` fills with zeros what it keeps for its gradient, before its first step: as much memory again is written, which on a
TPU costs more than to keep it (docs/performance.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

LayerFn = Callable[[Any, Any, Any], Any]


def run(layer: LayerFn, params: Any, x: Any, given: Any, unroll: int) -> Any:
    """The last of x = layer(params of layer n, x, given) for all n.

    Args:
      layer: what its gradient keeps and what it computes again is its own affair, by `jax.checkpoint`.
      params: arrays (layers, ...).
      given: what every layer gets; no gradient of it is taken.
      unroll: layers in a step of the loop. Where that is all, there is no loop, and each layer keeps what it needs by itself.
    """
    if unroll >= len(jax.tree.leaves(params)[0]):
        return _scan(layer, params, x, given, unroll)
    return _scan_with_vjp(layer, params, x, given, unroll)


def _scan(layer: LayerFn, params: Any, x: Any, given: Any, unroll: int) -> Any:
    return jax.lax.scan(lambda x, p: (layer(p, x, given), None), x, params, unroll=unroll)[0]


_scan_with_vjp = jax.custom_vjp(_scan, nondiff_argnums=(0, 4))


def _forward(layer: LayerFn, params: Any, x: Any, given: Any, unroll: int) -> tuple[Any, Any]:
    layers = len(jax.tree.leaves(params)[0])
    pull: Any = None

    def one(p: Any, x: Any) -> tuple[Any, list[Array]]:
        """A layer, and what its gradient needs besides its parameters and what every layer gets."""
        nonlocal pull
        y, back = jax.vjp(lambda p, x: layer(p, x, given), p, x)
        needed, tree = jax.tree.flatten(back)
        had = jax.tree.leaves((p, given))
        new = {id(array): array for array in needed}
        for array in had:
            new.pop(id(array), None)
        places = {id(array): place for place, array in enumerate([*had, *new.values()])}
        pull = functools.partial(_apply_layer_vjp, tree, [places[id(array)] for array in needed])
        return y, list(new.values())

    def step(carry: Any, at: Any) -> tuple[Any, None]:
        (x, kept), (n, p) = carry, at
        x, new = one(p, x)
        return (x, [jax.lax.dynamic_update_index_in_dim(*both, n, 0) for both in zip(kept, new, strict=True)]), None

    _, shapes = jax.eval_shape(lambda params, x: one(jax.tree.map(lambda y: y[0], params), x), params, x)
    kept = [jax.lax.empty((layers, *found.shape), found.dtype) for found in shapes]
    (x, kept), _ = jax.lax.scan(step, (x, kept), (jnp.arange(layers), params), unroll=unroll)
    return x, (Partial(pull), params, given, kept)


def _apply_layer_vjp(
    tree: Any, places: list[int], p: Any, given: Any, kept: list[Array], gradient: Any
) -> tuple[Any, Any]:
    """The gradients of a layer's parameters and input."""
    arrays = [*jax.tree.leaves((p, given)), *kept]
    return jax.tree.unflatten(tree, [arrays[place] for place in places])(gradient)


def _backward(layer: LayerFn, unroll: int, saved: Any, gradient: Any) -> tuple[Any, Any, None]:
    pull, params, given, kept = saved

    def step(gradient: Any, at: Any) -> tuple[Any, Any]:
        p, of_layer = at
        d_params, gradient = pull(p, given, of_layer, gradient)
        return gradient, d_params

    gradient, d_params = jax.lax.scan(step, gradient, (params, kept), reverse=True, unroll=unroll)
    return d_params, gradient, None


_scan_with_vjp.defvjp(_forward, _backward)
