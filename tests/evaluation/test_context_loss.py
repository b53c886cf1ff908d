"""Losses by block after true blocks and after own estimates, on a small model."""

import jax
import jax.numpy as jnp
import numpy as np

from madformer_jax.diffusion import own_context, schedule
from madformer_jax.evaluation import context_loss
from madformer_jax.evaluation.split_probe import Batch
from tests.diffusion.test_sampler import ONE_STAGE
from tests.small import small


def test_only_blocks_after_others_depend_on_the_context(monkeypatch):
    """Estimates that equal the truth give equal losses."""
    model, params = small(depth=2, diffusion_depth=1, classes=3, **ONE_STAGE)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, *model.config.sizes.block_shape), np.float32))
    batch = Batch(z, jnp.array([[1], [0]]), None, jax.random.key(3))
    other = batch._replace(key=jax.random.key(4))
    measured, of_other, of_both = (
        context_loss.losses_by_block(model, params, batches, schedule.DEFAULT, 500)
        for batches in ([batch], [other], [batch, other])
    )
    np.testing.assert_allclose(of_both.true, (measured.true + of_other.true) / 2, rtol=1e-5)
    assert measured.true.shape == (4,)
    np.testing.assert_allclose(measured.estimated[0], measured.true[0], rtol=1e-5)  # nothing comes before it
    assert (np.abs(measured.estimated[1:] / measured.true[1:] - 1) > 1e-4).all()
    monkeypatch.setattr(own_context, "replace", lambda model, source, z, *rest: z)
    same = context_loss.losses_by_block(model, params, [batch], schedule.DEFAULT, 500)
    np.testing.assert_allclose(same.estimated, measured.true, rtol=1e-5)
    t_key, noise_key, _ = jax.random.split(batch.key, 3)
    t, noise = schedule.DEFAULT.uniform_timesteps(t_key, z.shape[:2], 999), jax.random.normal(noise_key, z.shape)
    noisy = schedule.DEFAULT.add_noise(z, noise, t)
    output = jax.jit(lambda: model.apply({"params": params}, z, noisy, t, batch.tokens, terms=("image",)).image)()
    np.testing.assert_allclose(measured.true, ((output - noise) ** 2).mean((0, 2, 3)), rtol=1e-4)
