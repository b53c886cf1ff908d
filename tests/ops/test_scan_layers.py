import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.ops import scan_layers

LAYERS, SIZE = 5, 4


def layer(p, x, shared):
    shift, index = shared
    y = jnp.sin(x["a"] @ p["w"] + shift) * p["b"]
    return {"a": x["a"] + y, "b": x["b"] + y[index] * y[index]}


@pytest.fixture
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"w": (LAYERS, SIZE, SIZE), "b": (LAYERS, SIZE)}
    params = {name: jax.random.normal(key, shapes[name]) / SIZE for name, key in zip(shapes, keys)}
    x = {"a": jax.random.normal(keys[2], (3, SIZE)), "b": jax.random.normal(keys[3], (SIZE,))}
    return params, x, (jnp.full(SIZE, 0.5), jnp.asarray(1))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [1, 2, LAYERS])
def test_scan_and_its_gradient_equal_unrolled_layers(unroll, remat, arguments):
    params, x, shared = arguments
    layer_fn = jax.checkpoint(layer) if remat else layer

    def scanned(params, x):
        return scan_layers.run(layer_fn, params, x, shared, unroll)

    def unrolled(params, x):
        for n in range(LAYERS):
            x = layer({name: p[n] for name, p in params.items()}, x, shared)
        return x

    def gradient(function):
        return jax.jit(jax.value_and_grad(lambda *args: sum((y**2).sum() for y in function(*args).values()), (0, 1)))

    actual, expected = gradient(scanned)(params, x), gradient(unrolled)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_rematerialized_layers_store_their_inputs_only(arguments):
    """Residuals exclude the parameters and the shared input, which exist anyway."""

    def residual_shapes(layer_fn):
        _, (*_, arrays) = scan_layers._forward(layer_fn, *arguments, 1)
        return sorted(array.shape for array in arrays)

    assert residual_shapes(jax.checkpoint(layer)) == [(LAYERS, 3, SIZE)]
    assert len(residual_shapes(layer)) > 1
