from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import losses, schedule
from madformer_jax.models import madformer
from madformer_jax.models.madformer import MADFormer, ModelOutputs
from tests import tiny
from tests.small import random_params


def test_terms_are_mean_squared_errors_and_next_token_log_likelihood():
    rng = np.random.default_rng(0)
    shape = (2, 4, 9, 3)
    eps, hidden, clean, z, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(5))
    logits, tokens = rng.normal(size=(2, 3, 5)).astype(np.float32), np.array([[0, 4, 2], [3, 1, 1]])
    computed = losses.unweighted_terms(
        ModelOutputs(*map(jnp.asarray, (eps, hidden, clean, logits))), z, noise, jnp.asarray(tokens)
    )
    nll = [np.log(np.exp(logits[b, i]).sum()) - logits[b, i, tokens[b, i + 1]] for b in range(2) for i in range(2)]
    expected = {
        "image": ((eps - noise) ** 2).mean(),
        "hidden": ((hidden - z) ** 2).mean(),
        "clean": ((clean - z) ** 2)[:, :3].mean(),
        "text": np.mean(nll),
    }
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(computed[name], value, rtol=1e-5)
    padded = losses.unweighted_terms(
        ModelOutputs(None, None, None, jnp.asarray(logits)), z, noise, tokens, np.array([1, 2])
    )
    np.testing.assert_allclose(padded["text"], nll[2], rtol=1e-5)  # a single token is predicted


class ZeroModel:
    """A fake model that predicts no noise and records its arguments."""

    __class__ = MADFormer  # for the checks of types
    config = SimpleNamespace(prediction_type="eps", block_order="raster", default_order=None)

    def apply(self, variables, z, noisy, t, tokens, lengths, *, terms, order, clean_t=None):
        self.terms, self.context, self.clean_t, self.noisy, self.t = terms, z, clean_t, noisy, t
        return ModelOutputs(jnp.zeros_like(z), None, None, None)


def test_quarter_losses_average_the_blocks_in_their_timesteps():
    z, key = jnp.zeros((3, 4, 5, 2)), jax.random.key(3)
    model = ZeroModel()
    loss, metrics = losses.training_loss(model, {}, z, None, key, losses.LossWeights(hidden=0.0))
    assert model.terms == ("image",)
    t_key, noise_key = jax.random.split(key)
    t = np.asarray(jax.random.randint(t_key, (3, 4), 0, 1000))
    errors = np.asarray(jax.random.normal(noise_key, z.shape) ** 2).mean(axis=(2, 3))
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
    for q in range(4):
        inside = (t >= 250 * q) & (t < 250 * (q + 1))
        np.testing.assert_allclose(
            metrics[f"loss_q{q + 1}"], errors[inside].mean() if inside.any() else np.nan, rtol=1e-5
        )


def test_context_noise_passes_its_timesteps_to_the_model():
    """Noisy blocks and errors are as without context noise; only clean blocks change."""
    z, key, model = jnp.full((50, 4, 30, 2), 0.5), jax.random.key(4), ZeroModel()
    weights = losses.LossWeights(hidden=0.0)
    loss, _ = losses.training_loss(model, {}, z, None, key, weights)
    assert model.context is z and model.clean_t is None
    noised, _ = losses.training_loss(model, {}, z, None, key, weights, context_noise=300)
    assert loss == noised
    assert 0 <= model.clean_t.min() < 20 and 280 < model.clean_t.max() <= 300
    alpha, sigma = schedule.DEFAULT.alpha_sigma(model.clean_t[..., None, None])
    noise = np.asarray((model.context - alpha * z) / sigma)
    np.testing.assert_allclose(noise.std(), 1, atol=0.03)
    assert abs(np.corrcoef(noise[0, 0].ravel(), noise[0, 1].ravel())[0, 1]) < 0.5


def test_flow_trains_on_its_path_and_its_velocity():
    z, key, model = jnp.full((50, 4, 30, 2), 0.5), jax.random.key(4), ZeroModel()
    model.config = SimpleNamespace(prediction_type="v", block_order="raster", default_order=None)
    weights = losses.LossWeights(hidden=0.0)
    path = schedule.make("flow", "logit_normal", 3.0)
    loss, metrics = losses.training_loss(model, {}, z, None, key, weights, context_noise=300, schedule=path)
    u = (model.t + 0.5)[..., None, None] / 1000
    noise = (model.noisy - (1 - u) * z) / u
    np.testing.assert_allclose(noise.std(), 1, atol=0.03)
    np.testing.assert_allclose(loss, ((noise - z) ** 2).mean(), rtol=1e-3)
    assert model.t.mean() > 600 and model.clean_t.dtype == model.t.dtype == jnp.float32
    assert model.clean_t.max() <= 300
    inside = (model.t >= 750) & (model.t < 1000)
    np.testing.assert_allclose(
        metrics["loss_q4"], np.asarray((noise - z) ** 2).mean((2, 3))[np.asarray(inside)].mean(), rtol=1e-3
    )


@pytest.mark.parametrize("hidden", [0.0, 0.1])
def test_without_a_reader_of_clean_blocks_their_noise_has_no_effect(hidden):
    """`config.validation` refuses noise on the context only there. The hidden loss alone reads clean blocks."""
    c = tiny.get_config("plain")
    c.model.ar_condition, c.model.hidden_from, c.model.diffusion_attention = False, "noisy", "block"
    model, weights = madformer.build(c), losses.LossWeights(**c.loss)._replace(hidden=hidden)
    z = jax.random.normal(jax.random.key(0), (2, *model.config.sizes.block_shape))
    clean, noised = (
        losses.training_loss(model, random_params(model), z, None, jax.random.key(1), weights, context_noise=noise)[0]
        for noise in (0, 300)
    )
    assert (clean == noised) == (hidden == 0)
