"""A scan over layers of the same kind, with a gradient that needs less memory traffic.

`jax.lax.scan` fills its buffers for residuals with zeros before the first step. That writes as much
memory again, which costs more on a TPU than storing the residuals (docs/engineering_log.md). `run`
stores them in uninitialized buffers instead. `models.transformer` runs its stages with it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial, PyTreeDef
from jaxtyping import PyTree

LayerFn = Callable[[PyTree, PyTree, PyTree], PyTree]


def run(layer: LayerFn, params: PyTree, x: PyTree[Array], shared: PyTree, unroll: int) -> PyTree[Array]:
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


def _scan(layer: LayerFn, params: PyTree, x: PyTree[Array], shared: PyTree, unroll: int) -> PyTree[Array]:
    return jax.lax.scan(lambda x, p: (layer(p, x, shared), None), x, params, unroll=unroll)[0]


_scan_with_vjp = jax.custom_vjp(_scan, nondiff_argnums=(0, 4))


def _forward(layer: LayerFn, params: PyTree, x: PyTree[Array], shared: PyTree, unroll: int) -> tuple[PyTree, PyTree]:
    layers = len(jax.tree.leaves(params)[0])
    layer_vjp: Callable[..., PyTree] | None = None

    def apply_layer(p: PyTree, x: PyTree) -> tuple[PyTree, list[Array]]:
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

    def step(carry: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
        (x, buffers), (n, p) = carry, inputs
        x, residuals = apply_layer(p, x)
        pairs = zip(buffers, residuals, strict=True)
        return (x, [jax.lax.dynamic_update_index_in_dim(*pair, n, 0) for pair in pairs]), None

    _, shapes = jax.eval_shape(lambda params, x: apply_layer(jax.tree.map(lambda y: y[0], params), x), params, x)
    buffers = [jax.lax.empty((layers, *shape.shape), shape.dtype) for shape in shapes]
    (x, buffers), _ = jax.lax.scan(step, (x, buffers), (jnp.arange(layers), params), unroll=unroll)
    return x, (Partial(layer_vjp), params, shared, buffers)


def _apply_layer_vjp(
    tree: PyTreeDef, indices: list[int], p: PyTree, shared: PyTree, residuals: list[Array], gradient: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the gradients of the parameters and of the input of a layer."""
    arrays = [*jax.tree.leaves((p, shared)), *residuals]
    return jax.tree.unflatten(tree, [arrays[i] for i in indices])(gradient)


def _backward(layer: LayerFn, unroll: int, saved: PyTree, gradient: PyTree) -> tuple[PyTree, PyTree, None]:
    layer_vjp, params, shared, buffers = saved

    def step(gradient: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        p, residuals = inputs
        d_params, gradient = layer_vjp(p, shared, residuals, gradient)
        return gradient, d_params

    gradient, d_params = jax.lax.scan(step, gradient, (params, buffers), reverse=True, unroll=unroll)
    return d_params, gradient, None


_scan_with_vjp.defvjp(_forward, _backward)
