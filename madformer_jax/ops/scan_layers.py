"""A scan over layers of the same kind, with a gradient that needs less memory traffic.

`jax.lax.scan` fills its buffers for residuals with zeros before the first step. That writes as much
memory again, which costs more on a TPU than storing the residuals (docs/engineering_log.md). `run`
stores them in uninitialized buffers instead. `models.transformer` runs its stages with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

LayerFn = Callable[[Any, Any, Any], Any]


def run(layer: LayerFn, params: Any, x: Any, shared: Any, unroll: int) -> Any:
    """Applies `x = layer(layer_params, x, shared)` for all layers and returns the last x.

    Args:
      layer: Function of one layer. Wrap it in `jax.checkpoint` to choose its residuals.
      params: Arrays of all layers, each `(layers, ...)`.
      x: Input of the first layer.
      shared: Input of every layer. No gradient of it is taken.
      unroll: Layers per step of the loop. If it covers all layers, no loop is compiled and each
        layer keeps its own residuals.
    """
    if unroll >= len(jax.tree.leaves(params)[0]):
        return _scan(layer, params, x, shared, unroll)
    return _scan_with_vjp(layer, params, x, shared, unroll)


def _scan(layer: LayerFn, params: Any, x: Any, shared: Any, unroll: int) -> Any:
    return jax.lax.scan(lambda x, p: (layer(p, x, shared), None), x, params, unroll=unroll)[0]


_scan_with_vjp = jax.custom_vjp(_scan, nondiff_argnums=(0, 4))


def _forward(layer: LayerFn, params: Any, x: Any, shared: Any, unroll: int) -> tuple[Any, Any]:
    layers = len(jax.tree.leaves(params)[0])
    layer_vjp: Any = None

    def apply_layer(p: Any, x: Any) -> tuple[Any, list[Array]]:
        """Returns the output of a layer and its residuals, without parameters and shared input."""
        nonlocal layer_vjp
        y, vjp = jax.vjp(lambda p, x: layer(p, x, shared), p, x)
        needed, tree = jax.tree.flatten(vjp)
        inputs = jax.tree.leaves((p, shared))
        residuals = {id(array): array for array in needed}
        for array in inputs:
            residuals.pop(id(array), None)
        index = {id(array): i for i, array in enumerate([*inputs, *residuals.values()])}
        layer_vjp = functools.partial(_apply_layer_vjp, tree, [index[id(array)] for array in needed])
        return y, list(residuals.values())

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        (x, buffers), (n, p) = carry, inputs
        x, residuals = apply_layer(p, x)
        pairs = zip(buffers, residuals, strict=True)
        return (x, [jax.lax.dynamic_update_index_in_dim(*pair, n, 0) for pair in pairs]), None

    _, shapes = jax.eval_shape(lambda params, x: apply_layer(jax.tree.map(lambda y: y[0], params), x), params, x)
    buffers = [jax.lax.empty((layers, *shape.shape), shape.dtype) for shape in shapes]
    (x, buffers), _ = jax.lax.scan(step, (x, buffers), (jnp.arange(layers), params), unroll=unroll)
    return x, (Partial(layer_vjp), params, shared, buffers)


def _apply_layer_vjp(
    tree: Any, indices: list[int], p: Any, shared: Any, residuals: list[Array], gradient: Any
) -> tuple[Any, Any]:
    """Returns the gradients of the parameters and of the input of a layer."""
    arrays = [*jax.tree.leaves((p, shared)), *residuals]
    return jax.tree.unflatten(tree, [arrays[i] for i in indices])(gradient)


def _backward(layer: LayerFn, unroll: int, saved: Any, gradient: Any) -> tuple[Any, Any, None]:
    layer_vjp, params, shared, buffers = saved

    def step(gradient: Any, inputs: Any) -> tuple[Any, Any]:
        p, residuals = inputs
        d_params, gradient = layer_vjp(p, shared, residuals, gradient)
        return gradient, d_params

    gradient, d_params = jax.lax.scan(step, gradient, (params, buffers), reverse=True, unroll=unroll)
    return d_params, gradient, None


_scan_with_vjp.defvjp(_forward, _backward)
