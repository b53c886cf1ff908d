"""Products that stay float32 on a TPU, whose default is bfloat16, and in bfloat16 models."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from madformer_jax.evaluation.networks import inception_v3
from madformer_jax.models import unet
from madformer_jax.ops.attention.xla_blocks import XlaBlocks


def is_program(param: Any) -> bool:
    """Returns whether a parameter of an equation is a jaxpr, open or closed."""
    return hasattr(param, "eqns")


def products(jaxpr: Any) -> Iterator[Any]:
    """Yields the matrix products and convolutions of a jaxpr and of its inner jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=is_program):
            if is_program(inner):
                yield from products(inner)


def is_exact(eqn: Any) -> bool:
    highest = (jax.lax.Precision.HIGHEST,) * 2
    return eqn.params["precision"] == highest and {x.aval.dtype for x in eqn.invars} == {jnp.dtype("float32")}


def products_of(module: Any, *args: Any) -> list[Any]:
    program = jax.make_jaxpr(lambda *args: module.init_with_output(jax.random.key(0), *args)[0])(*args)
    return list(products(program.jaxpr))


@pytest.mark.parametrize("kind", ["raw", "sinusoidal"])
def test_time_embedding_is_exact(kind):
    matrix_products = products_of(unet.TimeEmbedding(6, kind, jnp.bfloat16), jnp.arange(3))
    assert len(matrix_products) == 2 and all(map(is_exact, matrix_products))


def test_last_convolution_of_a_bfloat16_upsampler_is_exact():
    x, skips = jnp.ones((2, 4, 4, 5), jnp.bfloat16), [jnp.ones((2, 4, 4, 8), jnp.bfloat16)] * 2
    config = unet.UNetConfig(
        (8,), layers=1, attention=(False,), groups=2, heads=2, time_width=6, time_embedding="raw", stride=2, kernel=3,
        dtype=jnp.bfloat16, implementation=XlaBlocks(),
    )  # fmt: skip
    *_, before, last = products_of(unet.Upsampler(3, config), x, jnp.arange(2), skips)
    assert last.outvars[0].aval.shape[-1] == 3 and is_exact(last)
    assert before.invars[0].aval.dtype == jnp.bfloat16


@pytest.mark.parametrize("module", [inception_v3.Conv(4, (1, 7)), inception_v3.Classifier()])
def test_inception_is_exact(module):
    shape = (2, 8, 8, 3) if isinstance(module, inception_v3.Conv) else (2, 3)
    (product,) = products_of(module, jnp.ones(shape))
    assert is_exact(product)
