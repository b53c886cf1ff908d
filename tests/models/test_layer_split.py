"""One set of parameters at several D: the same numbers as a model that was built with that D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import elastic_depth, schema
from madformer_jax.cost import flops
from madformer_jax.diffusion import sampler, schedule
from madformer_jax.errors import ConfigError
from madformer_jax.models import layer_split
from madformer_jax.models.inference_params import inference_params
from madformer_jax.training import elastic_step, train_step
from tests.diffusion.test_sampler import ONE_STAGE, without_cache
from tests.small import random_params, small, small_config


def test_a_split_keeps_the_order_of_the_layers():
    model, params = small()
    assert layer_split.fit(model, params) is params
    for depth in (1, 3, 4):
        other = layer_split.with_depth(model, depth)
        fit = jax.eval_shape(lambda params, other=other: layer_split.fit(other, params), params)
        assert jax.tree.map(jnp.shape, fit) == jax.tree.map(jnp.shape, random_params(other))
    whole = jax.jit(lambda params: layer_split.fit(layer_split.with_depth(model, 4), params))(params)
    back = jax.jit(lambda params: layer_split.fit(model, params))(whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))
    gate = whole["diffusion_layers"]["body"]["tower_pred"]["gate"]["kernel"]
    stored = [params[stage][part]["tower_pred"]["gate"]["kernel"] for stage, part in (
        ("ar_layers", "body"), ("ar_layers", "last"), ("diffusion_layers", "body"))]  # fmt: skip
    np.testing.assert_array_equal(gate, [stored[0][0], stored[1], stored[2][0]])


@pytest.mark.parametrize("depth", [1, 3])
def test_cached_sampling_at_another_depth_equals_full_recomputation(depth):
    """The stored split is D = 2."""
    own, params = small(depth=3, classes=3, **ONE_STAGE)
    model = layer_split.with_depth(own, depth)
    noise = np.random.default_rng(2).standard_normal((2, *model.config.sizes.block_shape), np.float32)
    tokens = np.array([[2], [0]])
    settings = {"solver": "ddim", "spacing": "trailing", "steps": 2}

    @jax.jit
    def draw(params, noise, tokens):
        return sampler.sample(model, inference_params(model, params, 0), noise, tokens, guidance=2.0, **settings)

    cached = np.asarray(draw(params, noise, tokens))
    fit = layer_split.fit(model, params)
    expected = without_cache(model, fit, noise, tokens, None, None, path=schedule.DEFAULT, guidance=2.0, **settings)
    error, size = (np.linalg.norm(x, axis=(2, 3)) for x in (cached - expected, expected))
    assert (error < 2e-5 * size).all()


def test_the_loss_of_a_drawn_depth_is_that_of_a_model_with_this_depth():
    """With rollouts as own context, whose averages have the stored split too."""
    c = small_config(depth=3, **ONE_STAGE)
    c.train.elastic_depth, c.train.elastic_depths = True, (1, 2)
    c.train.own_context, c.train.own_context_steps = 1.0, 2
    fixed = elastic_depth.with_depth(c, 1)
    setups = train_step.make_setup(c), train_step.make_setup(fixed)
    params = random_params(setups[0].model)
    drawn = setups[0]._replace(model=layer_split.with_depth(setups[0].model, 1))
    batch = {"image": np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8), "label": np.zeros(2, np.int32)}
    losses = [
        float(jax.jit(train_step.make_loss(s, config, 0.0))(tree, batch, {}, jax.random.key(1), averages=tree)[0])
        for s, config, tree in ((drawn, c, params), (setups[1], fixed, layer_split.fit(setups[1].model, params)))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0.1


def test_costs_follow_the_depth_of_sampling_and_the_mean_depth_of_training():
    c = small_config()
    c.train.elastic_depth = True
    schema.validate(c)
    fixed = [elastic_depth.with_depth(c, depth) for depth in (1, 2, 4)]
    expected = np.mean([flops.training_step(x).total for x in fixed])
    assert flops.training_step(c).total == pytest.approx(expected)
    for c.sample.diffusion_depth, x in zip((1, 2, 4), fixed):
        assert flops.image_cost(c) == flops.image_cost(x)


def test_each_step_draws_a_depth_from_its_number():
    draws = [elastic_step.draw_depth((1, 2, 4), 3, step) for step in range(300)]
    assert draws[7:] == [elastic_step.draw_depth((1, 2, 4), 3, step) for step in range(7, 300)]
    assert {depth: draws.count(depth) > 70 for depth in draws} == {1: True, 2: True, 4: True}
    c = small_config()
    c.train.elastic_depth = True
    c.seed = 3  # A run that resumes at step 5 draws what the whole run would have drawn.
    step_fn = elastic_step.make_program(train_step.make_setup(c), c, lambda step, name: lambda: name, 5)
    assert [step_fn() for _ in range(20)] == [f"the training step of D = {depth}" for depth in draws[5:25]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample.diffusion_depth": 1}, "trained with D = 2 only. Use one of them or 0, or train with"),
        (
            {"train.elastic_depth": True, "sample.diffusion_depth": 3},
            "trained with D = 1, 2, 4 only. Use one of them or 0.",
        ),
        ({"train.elastic_depth": True, "train.elastic_depths": (1, 4)}, "model.diffusion_depth=2 is not in"),
        ({"train.elastic_depth": True, "train.elastic_depths": (2, 5)}, "each from 1 to config.model.depth=4"),
    ],
)
def test_a_depth_that_was_not_trained_is_refused(changes, message):
    c = small_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        schema.validate(c)
