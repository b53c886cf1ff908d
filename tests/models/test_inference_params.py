"""Parameters for sampling: cast once, and gathered if they fit."""

import jax
import jax.numpy as jnp
import numpy as np

from madformer_jax.cost import hlo
from madformer_jax.models import inference_params
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import generation
from tests.small import small


def test_casting_once_changes_no_bit():
    changes = {"blocks": 1, "depth": 1, "diffusion_depth": 1, "unet_channels": (4,), "unet_attention": (True,)}
    model, params = small(dtype="bfloat16", classes=3, **changes)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 64, 3)), jnp.float32)
    t = jnp.full((2, 1), 500)

    @jax.jit
    def outputs(params):
        converted = inference_params.inference_params(model, params, 0)
        return [model.apply({"params": p}, z, z, t, jnp.array([[1], [2]])) for p in (params, converted)]

    expected, converted = outputs(params)
    jax.tree.map(np.testing.assert_array_equal, expected, converted)


def test_layers_are_unstacked_if_no_loop_runs_over_them():
    changes = {"depth": 3, "diffusion_depth": 3, "unet_channels": (4,), "unet_attention": (False,)}
    model, params = small(scan_unroll=2, **changes)
    params = jax.tree.map(jnp.asarray, params)  # no jit below converts them
    rng = np.random.default_rng(0)
    noisy, condition = (jnp.asarray(rng.standard_normal((2, 1, 16, n)), jnp.float32) for n in (3, model.config.width))
    cache = model.apply({"params": params}, 2, method="empty_cache")
    cache = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), cache)

    def denoise(params):
        return model.apply({"params": params}, cache, condition, noisy, 5, 2, method="denoise")

    converted = inference_params.inference_params(model, params, 0)
    assert set(converted["diffusion_layers"]["body"]) == {"0", "1"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), denoise(converted), denoise(params))
    looped = inference_params.inference_params(small(scan_unroll=1, **changes)[0], params, 0)
    assert jax.tree.structure(looped) == jax.tree.structure(params)


def test_parameters_that_fit_are_gathered_before_the_loop():
    """Larger parameters are gathered in the loop over layers."""
    model, _ = small(depth=3, diffusion_depth=3, unet_channels=(4,), unet_attention=(False,))
    mesh = partitioning.make_mesh(1, 8, 1)
    split = generation.abstract_params(model, mesh)
    noisy = jax.ShapeDtypeStruct((8, 1, 16, 3), jnp.float32, sharding=partitioning.batch_sharding(mesh))

    def gathers(memory):
        def denoise(params, noisy):
            converted = {"params": inference_params.inference_params(model, params, memory)}
            cache = model.apply(converted, 8, method="empty_cache")
            condition = jnp.zeros((8, 1, model.config.sizes.tokens, model.config.width))
            return model.apply(converted, cache, condition, noisy, 5, 0, method="denoise")[0]

        with partitioning.scope(mesh):
            text = jax.jit(denoise).lower(split, noisy).compile().as_text()
        return {x.loop for x in hlo.collectives(text) if x.kind == "all-gather"}

    assert gathers(2**30) == {False}
    assert True in gathers(2**10)
