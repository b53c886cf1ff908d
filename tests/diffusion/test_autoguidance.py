"""Tests of guidance by a second model."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from madformer_jax.diffusion import sampler, schedule
from madformer_jax.diffusion.autoguidance import GuidedPair
from madformer_jax.models.madformer import MADFormer
from madformer_jax.ops.attention.cudnn import CudnnAttention
from tests.diffusion.test_sampler import without_cache
from tests.small import small
from tests.support import flash

SETTINGS = {"solver": "dpmpp_2m", "spacing": "trailing", "steps": 2}
LABELS = {"classes": 3, "prediction_type": "v"}
LAYERS = {"depth": 2, "diffusion_depth": 1, "unet_channels": (4,), "unet_attention": (False,)}


class Mixed:
    """The training forward of guide + w (model - guide), for `without_cache`."""

    def __init__(self, model, guide, w):
        self._networks, self._w, self.config = (model, guide), w, model.config

    def apply(self, variables, *args, **kwargs):
        first, second = (
            network.apply({"params": params}, *args, **kwargs).image
            for network, params in zip(self._networks, variables["params"])
        )
        return SimpleNamespace(image=second + self._w * (first - second))


@pytest.mark.parametrize(
    ("changes", "guide_changes"),
    [
        ({"unet_context": True, **LABELS, **LAYERS}, {"width": 8, **LABELS, **LAYERS}),
        ({"clean_stream": False, **LAYERS}, {"clean_stream": False, "mlp_width": 12, **LAYERS, "depth": 1}),
    ],
    ids=["labels, a smaller guide", "unconditional, without the clean stream"],
)
def test_guided_sampling_equals_full_recomputation_of_both_models(changes, guide_changes, monkeypatch):
    """With labels the model has the cache of cuDNN's attention, and the guide that of `blocks`, as in float32."""
    (model, params), (guide, guide_params) = small(**changes), small(**guide_changes)
    flash.replace_cudnn(monkeypatch)
    gpu_form = MADFormer(dataclasses.replace(model.config, attention=CudnnAttention(), device="gpu"))
    pair = GuidedPair(gpu_form if "classes" in changes else model, guide)
    both, w = (params, guide_params), 1.7
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 4, 16, 3), np.float32)
    tokens = np.array([[0], [2]], np.int32) if "classes" in changes else None
    draw = jax.jit(functools.partial(sampler.sample, pair, **SETTINGS))
    samples = draw(both, noise, tokens, guidance=np.full(2, w, np.float32))
    mixed = Mixed(model, guide, w)
    expected = without_cache(mixed, both, noise.copy(), tokens, None, None, *SETTINGS.values(), schedule.DEFAULT)
    assert np.linalg.norm(samples - expected) < 1e-4 * np.linalg.norm(expected)
