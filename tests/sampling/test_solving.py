"""Solver steps as arguments of a sampling program, with a fake network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import sampler, schedule
from madformer_jax.evaluation import sampling_grid
from madformer_jax.sampling import generation, solving
from tests import tiny
from tests.diffusion.test_parameterization import FakeModel

NOISE = np.random.default_rng(0).standard_normal((3, 2, 5, 2), np.float32)
TOKENS, KEYS = jnp.array([[0], [2], [1]]), jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize(
    ("solver", "clean_timestep"),
    [("dpmpp_2m", "zero"), ("euler", "noisy"), ("heun", "zero"), ("ancestral", "zero")],
)
def test_one_program_for_all_step_counts_gives_the_samples_of_programs_for_each(solver, clean_timestep):
    c = tiny.get_config("plain")
    c.model.classes, c.sample.solver, c.sample.guidance, c.sample.guidance_schedule = 10, solver, 2.0, "linear"
    path = schedule.make(**c.diffusion)
    model = FakeModel("x0", path)
    model.config.clean_timestep = clean_timestep

    def sample(steps, guidance, padded=None):
        settings = {"solver": solver, "spacing": "trailing", "steps": steps, "schedule": path, "guidance": guidance}
        return sampler.sample(model, {}, jnp.asarray(NOISE), TOKENS, keys=KEYS, clip_x0=0.7, padded=padded, **settings)

    program = jax.jit(lambda params, codec, inputs: sample(0, jnp.asarray(inputs.guidance), inputs.coefficients))
    static = jax.jit(sample, static_argnums=0)
    inputs = generation.Inputs(None, None, None, None, None)
    samples = []
    for c.sample.steps in (1, 2, 7):
        samples.append(solving.pad_steps(program, c, solving.padded_size(13))({}, {}, inputs))
        alone = static(c.sample.steps, solving.guidance_scales(c))
        np.testing.assert_allclose(samples[-1], alone, rtol=1e-5, atol=1e-6)
    assert program._cache_size() == 1
    assert np.abs(samples[1] - samples[2]).max() > 0.01


def test_settings_of_a_grid_share_a_program_if_only_their_steps_differ():
    c = tiny.get_config("plain")
    c.evaluate.grid = "solver=euler,heun;steps=2,80;spacing=trailing,linspace"
    grid = sampling_grid.expand_configs(c)
    keys = {sampling_grid.program_key(setting, grid) for setting in grid}
    assert {(key[0], size) for key, size in keys} == {("euler", 128), ("heun", 256)} and len(keys) == 2
    c.evaluate.grid = "steps=2;weights=raw,ema"
    (key,) = {sampling_grid.program_key(setting, sampling_grid.expand_configs(c)) for setting in [c]}
    assert key[1] == 0 and key[0][-2:] == ("trailing", 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"sample.solver": "ancestral"}, True),
        ({"sample.context_noise": 9}, True),
        ({"model.block_order": "random"}, True),  # each image draws its order
        ({"model.block_order": "random", "sample.block_order": "reverse"}, False),
    ],
)
def test_samples_depend_on_the_seed_if_sampling_draws_random_numbers(changes, expected):
    c = tiny.get_config("plain")
    c.update_from_flattened_dict(changes)
    assert solving.depends_on_seed(c) == expected
