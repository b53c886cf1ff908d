import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import choices
from madformer_jax.diffusion import parameterization, sampler, schedule


class FakeModel:
    """A fake model whose eps, returned as eps, v or x0, depends on tokens and earlier blocks."""

    clean_stream, clean_timestep, null_token, unet_context = True, "zero", 3, False

    def __init__(self, prediction_type):
        self.prediction_type = prediction_type

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def empty_cache(self, batch):
        return jnp.zeros((batch, 1, 1, 1))

    def cache_text(self, cache, tokens, lengths):
        return cache + 0.3 * tokens[:, :, None, None]

    def begin(self, batch):
        return jnp.zeros((batch, 1, 5, 2))

    def condition(self, cache, pred, block):
        return jnp.tanh(pred) + cache, cache

    def embed_clean(self, cache, z, t, block):
        return z

    def cache_clean(self, cache, clean, block):
        return cache

    def denoise(self, cache, condition, x, t, block):
        x = jnp.tile(x, (len(condition) // len(x), 1, 1, 1))
        eps = 0.9 * x + 0.2 * jnp.sin(3 * x) * jnp.cos(t / 300) + 0.1 * condition
        alpha, sigma = schedule.alpha_sigma(t[None, None])
        return parameterization.target(self.prediction_type, (x - sigma * eps) / alpha, eps, alpha, sigma), None


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_prediction_types_of_one_network_give_the_same_samples(solver, spacing):
    noise = np.random.default_rng(0).standard_normal((3, 2, 5, 2), np.float32)
    tokens = jnp.array([[0], [2], [1]])

    @jax.jit
    def sample(noise):
        def sample_type(kind, **settings):
            model = FakeModel(kind)
            return sampler.sample(model, {}, noise, tokens, solver=solver, spacing=spacing, steps=5, **settings)

        return [
            [sample_type(kind, **s) for kind in choices.PREDICTION_TYPES]
            for s in ({}, {"guidance": 2.0}, {"guidance": 2.0, "clip_x0": 0.7})
        ]

    samples = sample(noise)
    for eps, v, x0 in samples:
        for other in (v, x0):
            assert np.linalg.norm(other - eps) < 1e-5 * np.linalg.norm(eps)
    assert all(np.linalg.norm(a[0] - b[0]) > 0.01 for a, b in itertools.pairwise(samples))


@pytest.mark.parametrize("kind", choices.PREDICTION_TYPES)
def test_loss_weight_turns_errors_of_any_type_into_errors_of_v(kind):
    rng = np.random.default_rng(1)
    z, noise, error = rng.normal(size=(3, 2, 4, 5, 3))
    t = np.array([[3, 200, 600, 998], [50, 400, 800, 1]])
    alpha_bar = schedule.alphas_cumprod()[t][..., None, None]
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    x = alpha * z + sigma * noise
    output = parameterization.target(kind, z, noise, alpha, sigma)

    def v_of(output):
        x0 = parameterization.clean_estimate(kind, output, x, alpha, sigma)
        return alpha * (x - alpha * x0) / sigma - sigma * x0

    scale = 1.0 if kind == "v" else parameterization.loss_weight(kind, "v", alpha, sigma)
    np.testing.assert_allclose(v_of(output), alpha * noise - sigma * z, atol=1e-9)
    np.testing.assert_allclose(scale * error**2, (v_of(output + error) - v_of(output)) ** 2, rtol=1e-6)
    assert parameterization.loss_weight(kind, "output", alpha, sigma) is None
