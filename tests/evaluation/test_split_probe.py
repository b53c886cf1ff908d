"""The split probe, on a small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import parameterization, schedule
from madformer_jax.evaluation import split_probe
from madformer_jax.models.layerwise import LayerwiseMADFormer
from tests.diffusion.test_sampler import ONE_STAGE
from tests.small import small

STEPS, AR = 3, 1
CHANGES = {"depth": 3, "diffusion_depth": 2, "classes": 3, "unet_context": True, **ONE_STAGE}


def inputs(model):
    z = np.random.default_rng(0).standard_normal((2, *model.config.sizes.block_shape), np.float32)
    return split_probe.Batch(jnp.asarray(z), jnp.array([[1], [0]]), None, jax.random.key(3))


@pytest.fixture(scope="module")
def probed():
    model, params = small(**CHANGES)
    batch = inputs(model)
    return model, params, batch, split_probe.measure(model, params, [batch, batch], schedule.DEFAULT, "trailing", STEPS)


def test_layers_are_alike_where_nothing_changes(probed):
    _, _, _, measures = probed
    np.testing.assert_allclose(measures.to_first[:, 0], 1, atol=1e-5)  # a step with itself
    np.testing.assert_allclose(measures.to_first[:AR], 1, atol=1e-5)  # AR layers do not see the noise
    np.testing.assert_allclose(measures.to_previous[:AR], 1, atol=1e-5)
    assert (measures.to_first[AR:, 1:] < 0.999).all()
    np.testing.assert_allclose(measures.to_first[:, 1], measures.to_previous[:, 0], atol=1e-5)
    np.testing.assert_allclose(measures.masses.sum(axis=1), 1, atol=1e-5)
    assert (measures.masses > 0).all()


def test_losses_are_those_of_the_model_and_of_reused_layers(probed):
    """Without reuse the loss is that of the training forward. All layers reused: only the U-Net sees the step."""
    model, params, batch, measures = probed
    assert sorted(measures.reuse_loss) == [1, 2, 3]
    noise, losses = jax.random.normal(batch.key, batch.z.shape), []
    apply = jax.jit(lambda noisy, t: model.apply({"params": params}, batch.z, noisy, t, batch.tokens).image)
    for t in measures.timesteps[1:]:
        times = jnp.full(batch.z.shape[:2], t)
        noisy, level = schedule.DEFAULT.add_noise(batch.z, noise, times), schedule.DEFAULT.level(times[..., None, None])
        target = parameterization.target("eps", batch.z, noise, level)
        losses.append(np.mean((apply(noisy, times) - target) ** 2))
    assert measures.reuse_loss[1] == pytest.approx(np.mean(losses), rel=1e-4)
    assert len({round(x, 5) for x in measures.reuse_loss.values()}) == 3


def test_measures_are_means_over_batches(probed):
    model, params, batch, _ = probed
    other = batch._replace(z=2 * batch.z, key=jax.random.key(4))

    def measure(*batches):
        return split_probe.measure(model, params, batches, schedule.DEFAULT, "trailing", STEPS)

    both, first, second = measure(batch, other), measure(batch), measure(other)
    for name in ("to_first", "to_previous", "masses"):
        mean = (getattr(first, name) + getattr(second, name)) / 2
        np.testing.assert_allclose(getattr(both, name), mean, atol=1e-5)
    for reused, loss in both.reuse_loss.items():
        assert loss == pytest.approx((first.reuse_loss[reused] + second.reuse_loss[reused]) / 2, rel=1e-5)
        assert first.reuse_loss[reused] != pytest.approx(second.reuse_loss[reused], rel=1e-3)


def test_attention_masses_equal_dense_attention(monkeypatch):
    """Takes the weights from the dense mask over [text, own stream, context]."""
    model, params = small(**(CHANGES | {"attention": "reference"}))
    batch = inputs(model)
    t, outputs = jnp.full(batch.z.shape[:2], 500), []
    layerwise = LayerwiseMADFormer(model.config)

    def attend(q, k, v, mask=None, is_causal=False):
        if is_causal:
            mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, -jnp.inf))
        own = jnp.arange(k.shape[1]) - 1
        part = jnp.where(own < 0, 2, jnp.where(own < q.shape[1], 1, 0))
        outputs.append(jnp.mean(weights @ jax.nn.one_hot(part, 3), axis=1))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)

    @jax.jit
    def trace():
        masses = layerwise.apply({"params": params}, batch.z, batch.z, t, batch.tokens, method="trace").masses
        return masses, outputs

    masses, outputs = trace()
    blocks = model.config.sizes.blocks
    prediction = [x for x in outputs if x.shape[1] == blocks * model.config.sizes.tokens]
    expected = np.stack(prediction).reshape(3, 2, blocks, -1, 3).mean(axis=3)
    np.testing.assert_allclose(masses, expected, atol=2e-5)
    assert (masses[:, :, 0, 0] == 0).all()  # nothing comes before the first block


def test_the_suggested_depth_follows_its_rule():
    loss = {2: 1.0, 3: 1.04, 4: 1.2, 5: 1.0, 6: 1.0}
    assert split_probe.suggest_depth(loss, 6, 0.05) == 3  # five reused layers do not count behind four
    assert split_probe.suggest_depth(loss, 6, 0.01) == 4
    assert split_probe.suggest_depth(loss, 6, 0.5) == 1  # one layer stays a diffusion layer
