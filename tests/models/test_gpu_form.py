"""The form that a model takes for a GPU, run on a CPU with cuDNN's calls replaced."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import sampler, schedule
from madformer_jax.models.inference_params import inference_params
from madformer_jax.models.madformer import MADFormer
from madformer_jax.ops.attention import cudnn_calls
from madformer_jax.ops.attention.cudnn import CudnnAttention
from tests.models.test_madformer import stage_gradient
from tests.small import small
from tests.support import flash


def gpu_form(model, **changes):
    """Returns the model as it is built for a GPU."""
    return MADFormer(dataclasses.replace(model.config, attention=CudnnAttention(), device="gpu", **changes))


def test_a_gpu_has_the_gradient_of_other_devices(monkeypatch):
    flash.replace_cudnn(monkeypatch)
    model, params = small(depth=3, diffusion_depth=3)
    expected, actual = (
        jax.jit(stage_gradient(m, params))(params)["diffusion_layers"]
        for m in (model, gpu_form(model, remat="projections"))
    )
    assert float(jnp.linalg.norm(expected["body"]["tower_pred"]["down"]["kernel"])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), expected, actual)


@pytest.mark.parametrize("remat", ["projections", "attention"])
def test_attention_is_not_computed_again(remat, monkeypatch):
    """Counts cuDNN's calls in the gradient: in each of the two layers one for the diagonal and two for tiles."""
    flash.replace_cudnn(monkeypatch)
    monkeypatch.setattr(cudnn_calls, "flash_attention", jax.jit(flash.flash_attention, static_argnames="queries"))
    model, params = small(depth=3, diffusion_depth=3)
    program = str(jax.make_jaxpr(stage_gradient(gpu_form(model, remat=remat), params))(params))
    assert len(re.findall(r"name=flash_attention\b", program)) == 2 * 3


def test_sampling_on_a_gpu_equals_that_of_other_devices(monkeypatch):
    """On a GPU every layer has arrays of its own, for its parameters and its part of the cache."""
    flash.replace_cudnn(monkeypatch)
    model, params = small(depth=3, diffusion_depth=2, classes=3, unet_channels=(4,), unet_attention=(True,))
    gpu = gpu_form(model)
    params = jax.tree.map(jnp.asarray, params)
    cache = gpu.apply({"params": params}, 2, method="empty_cache")
    assert [len(stage.context) for stage in (cache.ar, cache.diffusion)] == [1, 2]
    noise = jax.random.normal(jax.random.key(2), (2, *model.config.sizes.block_shape))
    tokens = jnp.array([[2], [0]])
    settings = {"solver": "ddim", "spacing": "trailing", "steps": 2, "schedule": schedule.make("ddpm"), "guidance": 2.0}

    def draw(model, params):
        return sampler.sample(model, inference_params(model, params, 0), noise, tokens, **settings)

    expected, actual = (jax.jit(functools.partial(draw, m))(params) for m in (model, gpu))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
