"""Training on the model's own estimates of earlier blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.cost import flops
from madformer_jax.diffusion import losses, own_context, parameterization, sampler, schedule, solvers
from madformer_jax.errors import ConfigError
from madformer_jax.training import train_step
from tests.cost.test_flops import abstract, wide, xla_flops
from tests.diffusion.test_sampler import ONE_STAGE
from tests.small import random_params, small, small_config

PATH = schedule.make("flow")


def test_a_share_of_the_examples_follows_estimates():
    model, params = small(depth=2, diffusion_depth=1, classes=3, **ONE_STAGE)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, *model.config.sizes.block_shape), np.float32))
    tokens, key = jnp.array([[1], [0], [2], [1]]), jax.random.key(3)
    loss_of = functools.partial(
        losses.training_loss, model, z=z, tokens=tokens, key=key, weights=losses.LossWeights(hidden=0.0), schedule=PATH
    )

    @jax.jit
    def compute(params, averages, share):
        """Returns the loss, its gradient by the averages, and the context."""
        own = own_context.OwnContext(averages, share, 500)
        loss, gradient = jax.value_and_grad(lambda x: loss_of(params, own_context=own._replace(params=x))[0])(averages)
        context = own_context.replace(model, own, z, tokens, None, jax.random.fold_in(key, 3), PATH)
        return loss, gradient, context

    averages = jax.tree.map(lambda x: 0.9 * x, params)
    off, _, same = compute(params, averages, 0.0)
    np.testing.assert_array_equal(same, z)
    np.testing.assert_allclose(off, jax.jit(lambda params: loss_of(params)[0])(params), rtol=1e-6)
    on, of_averages, estimates = compute(params, averages, 1.0)
    assert not np.isclose(on, off, rtol=1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves(of_averages))  # the estimates pass no gradient
    some = compute(params, averages, 0.5)[2]
    replaced = np.array([(x == e).all() for x, e in zip(some, estimates)])
    assert 0 < replaced.sum() < 4
    np.testing.assert_array_equal(some[~replaced], z[~replaced])
    # One step from the noised truth, from the same random numbers.
    _, t_key, noise_key = jax.random.split(jax.random.fold_in(key, 3), 3)
    t = PATH.uniform_timesteps(t_key, z.shape[:2], 500)
    level = PATH.level(t[..., None, None])
    noisy = level.alpha * z + level.sigma * jax.random.normal(noise_key, z.shape)
    output = model.apply({"params": averages}, z, noisy, t, tokens).image
    expected = parameterization.clean_estimate("eps", output, noisy, level)
    assert np.linalg.norm(expected - estimates) < 1e-5 * np.linalg.norm(expected)


def test_one_step_is_bit_for_bit_the_estimate_of_one_forward_pass():
    model, params = small(depth=2, diffusion_depth=1, classes=3, **ONE_STAGE)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, *model.config.sizes.block_shape), np.float32))
    tokens, key = jnp.array([[1], [0], [2], [1]]), jax.random.key(5)

    @jax.jit
    def one_pass(params):
        _, t_key, noise_key = jax.random.split(key, 3)
        t = PATH.uniform_timesteps(t_key, z.shape[:2], 500)
        noisy = PATH.add_noise(z, jax.random.normal(noise_key, z.shape, jnp.float32), t)
        output = model.apply({"params": params}, z, noisy, t, tokens, None, terms=("image",)).image
        return parameterization.clean_estimate("eps", output, noisy, PATH.level(t[..., None, None]))

    def estimates(params):
        own = own_context.OwnContext(params, 1.0, 500)
        return own_context.replace(model, own, z, tokens, None, key, PATH)

    np.testing.assert_array_equal(jax.jit(estimates)(params), one_pass(params))


def test_flops_hold_the_additional_forward_pass():
    c = wide(blocks=4)
    c.train.own_context = 0.25
    model, params, z, *_ = abstract(c)

    def loss(params, averages, z):
        own = own_context.OwnContext(averages, 0.25, 500)
        return losses.training_loss(
            model, params, z, None, jax.random.key(0), losses.LossWeights(**c.loss), own_context=own
        )[0]

    assert xla_flops(jax.grad(loss), params, params, z) == pytest.approx(flops.training_step(c).total, rel=0.02)


STEPS = 3
ROLLOUTS = {
    "DDPM, captions": (
        schedule.DEFAULT,
        {"classes": 6, "text_length": 4, "depth": 3, "diffusion_depth": 2, "prediction_type": "v", **ONE_STAGE},
    ),
    "shifted flow, noisy clean timestep, reverse order, neighbors": (
        schedule.make("flow", shift=3.0),
        {
            "clean_timestep": "noisy", "block_order": "reverse", "unet_context": True, "depth": 2, "diffusion_depth": 1,
            "prediction_type": "x0", **ONE_STAGE,
        },
    ),
}  # fmt: skip


def sampled_by_cached_steps(model, params, z, x, t, tokens, lengths, path):
    """Samples each block after the true blocks before it, with the steps of the sampler and float64 tables."""
    call = functools.partial(sampler.BlockSteps, model, solver=solvers.make("ddim"), guided=False, clip_x0=0.0)

    @jax.jit
    def denoise(params, cache, condition, x, row, block):
        state = solvers.make("ddim").init(x)
        steps = call(params=params, clean_timestep=0)
        return steps.step(cache, condition, state, row, 1.0, block)[0].x

    @jax.jit
    def add(params, cache, pred, z, clean_t, block):
        steps = call(params=params, clean_timestep=clean_t)
        return steps.cache_clean(cache, z, None, block)

    condition = jax.jit(lambda params, *args: call(params=params, clean_timestep=0).condition(*args))
    cache, pred = jax.jit(lambda params: call(params=params, clean_timestep=0).begin(x, tokens, lengths))(params)
    blocks = []
    for i in range(z.shape[1]):
        levels = np.array([float(t[0, i]), *path_timesteps(path, float(t[0, i]))])
        rows = solvers.DDIM().table(path, levels.astype(path.dtype))
        rows = jax.tree.map(lambda y: np.asarray(y, np.float32), rows)
        rows = rows._replace(level=rows.level._replace(t=levels[:-1].astype(path.dtype)))
        block = np.int32(i)
        start, cache = condition(params, cache, pred, block)
        state = x[:, i : i + 1]
        for row in solvers.evaluation_rows(rows):
            state = denoise(params, cache, start, state, row, block)
        blocks.append(state)
        clean_t = rows.level.t[-1] if model.config.clean_timestep == "noisy" else 0
        cache, pred = add(params, cache, pred, z[:, i : i + 1], clean_t, block)
    return np.concatenate(blocks, axis=1)


def path_timesteps(path, start):
    """Returns the timesteps behind `start` of the sampler's trailing spacing, scaled to begin at `start`."""
    if path.dtype == jnp.int32:
        return [*(np.round((start + 1) * np.array([2, 1]) / 3) - 1), -1]
    u = (start + 0.5) / 999.5
    u /= path.shift - (path.shift - 1) * u
    rest = u * np.array([2, 1, 0]) / 3
    return -0.5 + 999.5 * path.shift * rest / (1 + (path.shift - 1) * rest)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_rollout_takes_the_steps_of_the_sampler_after_true_blocks(name):
    path, changes = ROLLOUTS[name]
    model, params = small(**changes)
    rng = np.random.default_rng(0)
    z, noise = (jnp.asarray(rng.standard_normal((2, *model.config.sizes.block_shape), np.float32)) for _ in range(2))
    tokens = jnp.array([[2, 4, 1, 0], [0, 3, 5, 2]]) if model.config.vocabulary else None
    lengths = None if tokens is None else jnp.array([3, 2])
    t = jnp.tile(jnp.array([999, 500, 251, 40]).astype(path.dtype), (2, 1))
    x = path.add_noise(z, noise, t)

    @jax.jit
    def rollout(z, x, t):
        return own_context.rollout(model, params, z, x, t, tokens, lengths, path, STEPS)

    estimates = np.asarray(rollout(z, x, t))
    expected = sampled_by_cached_steps(model, params, z, x, t, tokens, lengths, path)
    error, size = (np.linalg.norm(y, axis=(2, 3)) for y in (estimates - expected, expected))
    assert (error < 1e-4 * size).all(), error / size
    # A block reads the true blocks before it, and no other.
    changed = np.abs(np.asarray(rollout(z.at[:, 2].add(1.0), x, t)) - estimates).max(axis=(0, 2, 3))
    assert (changed[:3] == 0).all() and changed[3] > 1e-3


@pytest.mark.parametrize(
    "path", [schedule.DEFAULT, PATH, schedule.make("cosine", shift=2.0)], ids=lambda path: type(path).__name__
)
def test_steps_to_the_clean_end_are_those_of_the_solver(path):
    for steps in (1, 3, 16):
        starts = jnp.array([[999, 1, 0]]).astype(path.dtype)
        t = np.asarray(path.timesteps_to_clean(starts, steps))
        assert t.shape == (steps + 1, 1, 3) and t.dtype == path.dtype
        np.testing.assert_allclose(t[:, 0, 0], path.solver_timesteps("trailing", steps), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(t[0], starts, rtol=1e-6)
        assert (np.diff(t, axis=0) <= 0).all() and (t[:-1] > path.clean).all() and (t[-1] == path.clean).all()


def test_flops_of_a_rollout_hold_the_ar_layers_once():
    c = wide(**{"blocks": 4, "diffusion_depth": 2, "text.vocabulary": 10, "text.length": 5})
    c.train.own_context, c.train.own_context_steps = 0.5, STEPS
    model, params, z, t, tokens = abstract(c)

    def rollout(params, z, noisy, t, tokens):
        return own_context.rollout(model, params, z, noisy, t, tokens, None, schedule.DEFAULT, STEPS, unroll=True)

    args = params, z, z, t, tokens
    assert xla_flops(rollout, *args) == pytest.approx(c.train.batch * flops.own_context(c).total, rel=0.02)
    added = flops.training_step(c).total
    c.train.own_context = 0.0
    assert added - flops.training_step(c).total == pytest.approx(c.train.batch * flops.own_context(c).total)


def test_one_block_has_no_own_context():
    c = small_config(blocks=1)
    c.train.own_context = 0.5
    with pytest.raises(ConfigError, match=r"own_context=0.5 has no effect with config.model.blocks=1"):
        schema.validate(c)


def test_the_loss_takes_the_steps_of_the_config(monkeypatch):
    c = small_config(depth=2, diffusion_depth=1, **ONE_STAGE)
    c.train.own_context, c.train.own_context_steps = 0.5, STEPS
    setup, taken = train_step.make_setup(c), []
    monkeypatch.setattr(own_context, "rollout", lambda *args: (taken.append(args[-2]), args[3])[1])
    batch = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    params = random_params(setup.model)
    loss = functools.partial(train_step.make_loss(setup, c, 0.0), averages=params)
    jax.eval_shape(loss, params, batch, {}, jax.random.key(0))
    assert taken == [STEPS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.own_context": 0.0}, "own_context_steps=4 has no effect with config.train.own_context=0"),
        ({"model.clean_stream": False, "loss.clean": 0.0}, "own_context_steps=4 needs config.model.clean_stream=True"),
        ({"train.own_context_steps": 0}, "own_context_steps"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(changes, message):
    c = small_config()
    c.train.own_context, c.train.own_context_steps = 0.5, 4
    schema.validate(c)
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as error:
        schema.validate(c)
    assert "\n" not in str(error.value)
