import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import choices
from madformer_jax.diffusion import parameterization, sampler, schedule
from madformer_jax.models.cache import ModelCache
from madformer_jax.models.madformer import MADFormer


class FakeModel:
    """A fake model whose eps, returned as eps, v or x0, depends on tokens and earlier blocks."""

    __class__ = MADFormer  # for the checks of types

    def __init__(self, prediction_type, path):
        values = {
            "switches": SimpleNamespace(clean_stream=True),
            "clean_timestep": "zero",
            "null_token": 3,
            "unet_context": False,
            "default_order": None,
            "attention": SimpleNamespace(unrolls_layers=False),
        }
        self.config, self.path = SimpleNamespace(**values, prediction_type=prediction_type), path

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def empty_cache(self, batch, order):
        return ModelCache(jnp.zeros((batch, 1, 1, 1)), None)

    def cache_text(self, cache, tokens, lengths):
        return cache._replace(ar=cache.ar + 0.3 * tokens[:, :, None, None])

    def begin(self, batch):
        return jnp.zeros((batch, 1, 5, 2))

    def condition(self, cache, pred, block):
        return jnp.tanh(pred) + cache.ar, cache

    def embed_clean(self, cache, z, t, block):
        return z

    def cache_clean(self, cache, clean, block):
        return cache

    def denoise(self, cache, condition, x, t, block):
        x = jnp.tile(x, (len(condition) // len(x), 1, 1, 1))
        eps = 0.9 * x + 0.2 * jnp.sin(3 * x) * jnp.cos(t / 300) + 0.1 * condition
        level = self.path.level(t)
        x0 = (x - level.sigma * eps) / level.alpha
        return parameterization.target(self.config.prediction_type, x0, eps, level), None


@pytest.mark.parametrize(
    ("path", "solver", "spacing"),
    [
        ("ddpm", "ddim", "leading"), ("ddpm", "dpmpp_2m", "linspace"), ("flow", "heun", "trailing"),
        ("cosine", "euler", "trailing"),
    ],
)  # fmt: skip
def test_prediction_types_of_one_network_give_the_same_samples(path, solver, spacing):
    noise = np.random.default_rng(0).standard_normal((3, 2, 5, 2), np.float32)
    tokens, keys = jnp.array([[0], [2], [1]]), jax.random.split(jax.random.key(0), 3)
    path = schedule.make(path)

    @jax.jit
    def sample(noise):
        def sample_type(kind, **settings):
            model = FakeModel(kind, path)
            settings |= {"solver": solver, "spacing": spacing, "steps": 5, "schedule": path}
            return sampler.sample(model, {}, noise, tokens, keys=keys, **settings)

        return [
            [sample_type(kind, **s) for kind in choices.PREDICTION_TYPES]
            for s in ({}, {"guidance": 2.0}, {"guidance": 2.0, "clip_x0": 0.7})
        ]

    samples = sample(noise)
    for eps, v, x0 in samples:
        for other in (v, x0):
            assert np.linalg.norm(other - eps) < 1e-5 * np.linalg.norm(eps)
    assert all(np.linalg.norm(a[0] - b[0]) > 0.01 for a, b in itertools.pairwise(samples))


PATHS = pytest.mark.parametrize("path", choices.NOISE_PATHS)
KINDS = pytest.mark.parametrize("kind", choices.PREDICTION_TYPES)


def noisy_case(path):
    """Clean latents, noise, an error, and noise levels of timesteps (2, 4)."""
    rng = np.random.default_rng(1)
    z, noise, error = rng.normal(size=(3, 2, 4, 5, 3))
    t = np.array([[3, 200, 600, 998], [50, 400, 800, 1]])[..., None, None]
    return z, noise, error, schedule.make(path).level(t)


@PATHS
@KINDS
def test_an_output_without_error_gives_the_clean_latent(kind, path):
    z, noise, _, level = noisy_case(path)
    output = parameterization.target(kind, z, noise, level)
    x = level.alpha * z + level.sigma * noise
    np.testing.assert_allclose(parameterization.clean_estimate(kind, output, x, level), z, atol=1e-9)


@PATHS
@KINDS
def test_loss_weights_turn_errors_of_any_type_into_errors_of_v_or_of_x0(kind, path):
    z, noise, error, level = noisy_case(path)
    alpha, sigma = level.alpha, level.sigma
    x = alpha * z + sigma * noise
    output = parameterization.target(kind, z, noise, level)

    def v_and_x0(output):
        x0 = parameterization.clean_estimate(kind, output, x, level)
        return level.v_noise * (x - alpha * x0) / sigma - level.v_clean * x0, x0

    (v, x0), (wrong_v, wrong_x0) = v_and_x0(output), v_and_x0(output + error)
    np.testing.assert_allclose(v, {"flow": noise - z}.get(path, alpha * noise - sigma * z), atol=1e-9)
    scale = 1.0 if kind == "v" else parameterization.loss_weight(kind, "v", level)
    np.testing.assert_allclose(scale * error**2, (wrong_v - v) ** 2, rtol=1e-6)
    scale = parameterization.loss_weight(kind, "min_snr", level)  # Hang et al.: min(SNR, 5) times the error of x0
    np.testing.assert_allclose(scale * error**2, np.minimum((alpha / sigma) ** 2, 5) * (wrong_x0 - x0) ** 2, rtol=1e-5)
    assert parameterization.loss_weight(kind, "output", level) is None
