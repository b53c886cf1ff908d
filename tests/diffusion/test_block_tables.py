"""Blocks that differ in their number of solver steps, and noise on the context of later blocks."""

import functools

import jax
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.cost import flops
from madformer_jax.diffusion import sampler, schedule
from madformer_jax.errors import ConfigError
from madformer_jax.sampling import solving
from madformer_jax.sweeps import budget
from tests.diffusion.test_sampler import ONE_STAGE, without_cache
from tests.small import small, small_config

STEPS = (3, 1, 2, 1)
CASES = {
    "guided, Heun": ({"classes": 3, "clean_timestep": "noisy", "depth": 3, **ONE_STAGE}, "heun", 2.0),
    "noise on the context": ({"unet_context": True, "depth": 3, **ONE_STAGE}, "ddim", 1.0),
    "no clean stream": ({"clean_stream": False, "depth": 2, "diffusion_depth": 1, **ONE_STAGE}, "ancestral", 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_each_block_takes_its_own_steps(name):
    """Compares with a sampler without a cache that gives each block its own table of coefficients."""
    changes, solver, scale = CASES[name]
    model, params = small(**changes)
    noise = np.random.default_rng(2).standard_normal((2, *model.config.sizes.block_shape), np.float32)
    tokens = np.array([[2], [0]]) if model.config.vocabulary else None
    c = small_config(**changes)
    c.sample.solver, c.sample.steps_by_block = solver, ",".join(map(str, STEPS))
    c.sample.guidance, c.sample.guidance_schedule = scale, "linear"
    keys = jax.random.split(jax.random.key(7), 2)
    settings = {"solver": solver, "spacing": "trailing", "steps": solving.solver_steps(c)}
    settings |= {"context_noise": 300} if name == "noise on the context" else {}
    guidance = {"guidance": solving.guidance_scales(c)} if tokens is not None else {}
    draw = functools.partial(sampler.sample, model, schedule=schedule.DEFAULT, **settings)
    cached = np.asarray(jax.jit(draw)(params, noise, tokens, None, keys, **guidance))
    expected = without_cache(model, params, noise, tokens, None, keys, path=schedule.DEFAULT, **settings, **guidance)
    error, size = (np.linalg.norm(x, axis=(2, 3)) for x in (cached - expected, expected))
    assert (error < 2e-5 * size).all()


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("constant", (8, 8, 8, 8)),
        ("linear:16:4", (16, 12, 8, 4)),
        ("linear:1.5x:0.5x", (12, 9, 7, 4)),
        ("16,8,8,4", (16, 8, 8, 4)),
        ("2x/8/1x/0.01x", (16, 8, 8, 1)),
    ],
)
def test_costs_count_the_steps_of_each_block(text, steps):
    c = small_config()
    c.sample.steps, c.sample.steps_by_block, c.sample.solver = 8, text, "heun"
    assert flops.block_evaluations(c) == tuple(2 * n - 1 for n in steps)
    mean = sum(flops.block_evaluations(c)) / 4
    assert flops.nfe(c) == pytest.approx(0.5 + 0.5 * mean)
    assert flops.model_passes(c) == pytest.approx(0.5 + 0.5 * mean + 3 / 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16,8", "has 2 entries: give one for each of the 4 blocks"),
        ("linear:8", "must be 'constant', 'linear:16:4'"),
        ("falling", "must be 'constant', 'linear:16:4'"),
        ("0,1,1,1", "from 1"),
        ("1000,1,1,1", "gives a block 1000 steps"),
    ],
)
def test_wrong_steps_by_block_are_refused(text, message):
    c = small_config()
    c.sample.steps_by_block = text
    with pytest.raises(ConfigError, match=message):
        schema.validate(c)


def test_a_budget_scales_multiples_and_refuses_fixed_steps():
    c = small_config()
    c.sample.steps_by_block = "linear:1.5x:0.5x"
    steps = budget.solver_steps(c, "passes", 5.25)
    assert steps == 8 and budget.sampling_cost(c, "passes", steps) == pytest.approx(5.25)
    c.sample.steps_by_block = "16,8,8,4"
    with pytest.raises(ConfigError, match="fixes the steps of all blocks"):
        budget.solver_steps(c, "passes", 5.25)
