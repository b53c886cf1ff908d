import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.ops import scan_layers

LAYERS, SIZE = 5, 4


def layer(p, x, given):
    shift, place = given
    y = jnp.sin(x["a"] @ p["w"] + shift) * p["b"]
    return {"a": x["a"] + y, "b": x["b"] + y[place] * y[place]}


@pytest.fixture
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"w": (LAYERS, SIZE, SIZE), "b": (LAYERS, SIZE)}
    params = {name: jax.random.normal(key, shapes[name]) / SIZE for name, key in zip(shapes, keys)}
    x = {"a": jax.random.normal(keys[2], (3, SIZE)), "b": jax.random.normal(keys[3], (SIZE,))}
    return params, x, (jnp.full(SIZE, 0.5), jnp.asarray(1))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("unroll", [1, 2, LAYERS])
def test_a_loop_and_its_gradient_equal_one_layer_after_the_other(unroll, again, arguments):
    params, x, given = arguments
    used = jax.checkpoint(layer) if again else layer

    def looped(params, x):
        return scan_layers.run(used, params, x, given, unroll)

    def by_hand(params, x):
        for n in range(LAYERS):
            x = layer({name: p[n] for name, p in params.items()}, x, given)
        return x

    def gradient(function):
        return jax.jit(jax.value_and_grad(lambda *args: sum((y**2).sum() for y in function(*args).values()), (0, 1)))

    found, expected = gradient(looped)(params, x), gradient(by_hand)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_a_layer_that_is_computed_again_keeps_its_input_alone(arguments):
    """Neither the parameters, which are there, nor what every layer gets."""

    def kept(used):
        _, (*_, arrays) = scan_layers._forward(used, *arguments, 1)
        return sorted(array.shape for array in arrays)

    assert kept(jax.checkpoint(layer)) == [(LAYERS, 3, SIZE)]
    assert len(kept(layer)) > 1
