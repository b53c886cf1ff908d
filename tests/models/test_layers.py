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


def test_the_tests_check_the_shapes_of_annotations():
    with pytest.raises(TypeCheckError, match="parameter 'up'"):
        layers.swiglu(jnp.ones(2), jnp.ones(3))
