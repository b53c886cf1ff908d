import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import choices
from madformer_jax.diffusion import parameterization, sampler, schedule


class Fake:
    """Stands in for a model of one eps, which it gives in the words of eps, v or x0; tokens and the block before shape it."""

    clean_stream, clean_timestep, none, neighbours = True, "zero", 3, False

    def __init__(self, predicts):
        self.predicts = predicts

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def empty_cache(self, batch):
        return jnp.zeros((batch, 1, 1, 1))

    def read_text(self, cache, tokens, lengths):
        return cache + 0.3 * tokens[:, :, None, None]

    def begin(self, batch):
        return jnp.zeros((batch, 1, 5, 2))

    def condition(self, cache, pred, block):
        return jnp.tanh(pred) + cache, cache

    def embed_clean(self, cache, z, t, block):
        return z

    def extend(self, cache, clean, block):
        return cache

    def denoise(self, cache, condition, x, t, block):
        x = jnp.tile(x, (len(condition) // len(x), 1, 1, 1))
        eps = 0.9 * x + 0.2 * jnp.sin(3 * x) * jnp.cos(t / 300) + 0.1 * condition
        alpha, sigma = schedule.alpha_sigma(t[None, None])
        return parameterization.target(self.predicts, (x - sigma * eps) / alpha, eps, alpha, sigma), None


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_one_network_in_other_words_draws_the_same(solver, spacing):
    noise = np.random.default_rng(0).standard_normal((3, 2, 5, 2), np.float32)
    tokens = jnp.array([[0], [2], [1]])

    @jax.jit
    def draw(noise):
        def once(kind, **settings):
            return sampler.sample(Fake(kind), {}, noise, tokens, solver=solver, spacing=spacing, steps=5, **settings)

        return [
            [once(kind, **s) for kind in choices.PREDICTION_TYPES]
            for s in ({}, {"guidance": 2.0}, {"guidance": 2.0, "clip": 0.7})
        ]

    drawn = draw(noise)
    for eps, v, x0 in drawn:
        for other in (v, x0):
            assert np.linalg.norm(other - eps) < 1e-5 * np.linalg.norm(eps)
    assert all(np.linalg.norm(a[0] - b[0]) > 0.01 for a, b in itertools.pairwise(drawn))


@pytest.mark.parametrize("kind", choices.PREDICTION_TYPES)
def test_the_weighting_of_v_makes_any_error_one_of_v(kind):
    rng = np.random.default_rng(1)
    z, noise, wrong = rng.normal(size=(3, 2, 4, 5, 3))
    t = np.array([[3, 200, 600, 998], [50, 400, 800, 1]])
    alpha_bar = schedule.alphas_cumprod()[t][..., None, None]
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    x = alpha * z + sigma * noise
    right = parameterization.target(kind, z, noise, alpha, sigma)

    def v_of(output):
        x0 = parameterization.clean_estimate(kind, output, x, alpha, sigma)
        return alpha * (x - alpha * x0) / sigma - sigma * x0

    scale = 1.0 if kind == "v" else parameterization.loss_weight(kind, "v", alpha, sigma)
    np.testing.assert_allclose(v_of(right), alpha * noise - sigma * z, atol=1e-9)
    np.testing.assert_allclose(scale * wrong**2, (v_of(right + wrong) - v_of(right)) ** 2, rtol=1e-6)
    assert parameterization.loss_weight(kind, "output", alpha, sigma) is None
