import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from madformer_jax.models import layers


def test_convolution_of_2x2_positions_is_the_padded_convolution():
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 5))
    conv = layers.conv(4, 3, jnp.float32)
    params = conv.init(jax.random.key(1), x)["params"]
    kernel = np.asarray(params["kernel"].unbox())
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 2, j : j + 2] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(conv.apply({"params": params}, x), expected, atol=1e-5)


def test_one_pass_norms_equal_group_norm_and_silu():
    """The input has means far from zero, which must cancel no digits of the variance."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8)) + 100 * jnp.arange(8)

    def value_and_gradient(fused_norm):
        block = layers.ResNetBlock(8, 4, jnp.float32, fused_norm=fused_norm)
        params = nn.meta.unbox(block.init(jax.random.key(1), x)["params"])
        params = jax.tree.map(lambda y: y + 0.1 * jnp.cos(jnp.arange(y.size)).reshape(y.shape), params)

        def total(params, x):
            out = block.apply({"params": params}, x) - x
            return jnp.sum(out**2), out

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)

    actual, expected = (jax.jit(value_and_gradient, static_argnums=0)(form) for form in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), actual, expected)


def test_the_tests_check_the_shapes_of_annotations():
    with pytest.raises(TypeCheckError, match="parameter 'up'"):
        layers.swiglu(jnp.ones(2), jnp.ones(3))
