"""Training on the model's own estimates of earlier blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from madformer_jax.cost import flops
from madformer_jax.diffusion import losses, own_context, parameterization, schedule
from madformer_jax.models import madformer
from tests.cost.test_flops import wide, xla_flops
from tests.diffusion.test_sampler import ONE_STAGE
from tests.small import small

PATH = schedule.make("flow")


@pytest.fixture(scope="module")
def loss_of():
    """Returns a function that computes the loss and its gradients, given the source of estimates."""
    model, params = small(depth=2, diffusion_depth=1, classes=3, **ONE_STAGE)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, *model.config.sizes.block_shape), np.float32))
    tokens = jnp.array([[1], [0], [2], [1]])

    @jax.jit
    def compute(params, averages, share):
        """Returns the loss, its gradient by the averages, and the context."""

        def loss(params, averages):
            own = own_context.OwnContext(averages, share, 500)
            weights = losses.LossWeights(hidden=0.0)
            return losses.training_loss(
                model, params, z, tokens, jax.random.key(3), weights, schedule=PATH, own_context=own
            )[0]

        own = own_context.OwnContext(averages, share, 500)
        key = jax.random.fold_in(jax.random.key(3), 3)
        context = own_context.replace(model, own, z, tokens, None, key, PATH)
        return *jax.value_and_grad(loss, argnums=1)(params, averages), context

    def plain():
        return losses.training_loss(
            model, params, z, tokens, jax.random.key(3), losses.LossWeights(hidden=0.0), schedule=PATH
        )[0]

    return model, params, z, tokens, compute, jax.jit(plain)


def test_a_share_of_the_examples_follows_estimates(loss_of):
    model, params, z, tokens, compute, plain = loss_of
    averages = jax.tree.map(lambda x: 0.9 * x, params)
    off, _, same = compute(params, averages, 0.0)
    np.testing.assert_array_equal(same, z)
    np.testing.assert_allclose(off, plain(), rtol=1e-6)
    on, of_averages, estimates = compute(params, averages, 1.0)
    assert not np.isclose(on, off, rtol=1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves(of_averages))  # the estimates pass no gradient
    some = compute(params, averages, 0.5)[2]
    replaced = np.array([(x == e).all() for x, e in zip(some, estimates)])
    assert 0 < replaced.sum() < 4
    np.testing.assert_array_equal(some[~replaced], z[~replaced])
    # One step from the noised truth, from the same random numbers.
    _, t_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(3), 3), 3)
    t = PATH.uniform_timesteps(t_key, z.shape[:2], 500)
    level = PATH.level(t[..., None, None])
    noisy = level.alpha * z + level.sigma * jax.random.normal(noise_key, z.shape)
    output = model.apply({"params": averages}, z, noisy, t, tokens).image
    expected = parameterization.clean_estimate("eps", output, noisy, level)
    assert np.linalg.norm(expected - estimates) < 1e-5 * np.linalg.norm(expected)


def test_flops_hold_the_additional_forward_pass():
    c = wide(blocks=4)
    c.train.own_context = 0.25
    model = madformer.build(c)
    params = jax.eval_shape(lambda key: nn.meta.unbox(madformer.init(model, key)), jax.random.key(0))
    z = jax.ShapeDtypeStruct((c.train.batch, *model.config.sizes.block_shape), jnp.float32)

    def loss(params, averages, z):
        own = own_context.OwnContext(averages, 0.25, 500)
        return losses.training_loss(
            model, params, z, None, jax.random.key(0), losses.LossWeights(**c.loss), own_context=own
        )[0]

    assert xla_flops(jax.grad(loss), params, params, z) == pytest.approx(flops.training_step(c).total, rel=0.02)
