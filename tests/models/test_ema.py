"""Tests of power-function averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.models import ema

STEPS, EVERY = 400, 20


@pytest.fixture(scope="module")
def walk():
    """The parameters of each step of a random walk."""
    changes = np.random.default_rng(0).standard_normal((STEPS, 12)) * np.linspace(1, 0.1, STEPS)[:, None]
    return np.cumsum(changes, axis=0)


def profile_weights(width, steps):
    """Weights of steps 1 to `steps` in an average: the integral of the power function over each step."""
    edges = np.linspace(0, 1, steps + 1) ** (ema.exponent(width) + 1)
    return np.diff(edges)


def tracked(walk, width):
    """Returns the average after every step."""

    def step(average, inputs):
        average = ema.update(average, {"w": inputs[0]}, width, inputs[1])
        return average, average["w"]

    start = {"w": jnp.full(walk.shape[1], 7.0)}  # has no weight: step 1 replaces it
    return np.asarray(jax.lax.scan(step, start, (jnp.asarray(walk, jnp.float32), jnp.arange(1, len(walk) + 1)))[1])


@pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.2])
def test_the_standard_deviation_of_a_profile_is_its_width(width):
    weights, steps = profile_weights(width, 100_000), np.arange(100_000) / 100_000
    mean = np.sum(weights * steps)
    assert np.sqrt(np.sum(weights * (steps - mean) ** 2)) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_an_average_weights_each_step_by_its_power(walk, width):
    np.testing.assert_allclose(tracked(walk, width)[-1], profile_weights(width, STEPS) @ walk, rtol=1e-4, atol=1e-4)


def test_late_steps_keep_their_share(walk):
    """1 - (1 - 1 / t)^(gamma + 1) in float32 would lose its digits."""
    step, width = 10_000_000, 0.05
    share = ema.update(np.float32(0), np.float32(1), width, jnp.int32(step))
    assert share == pytest.approx((ema.exponent(width) + 1) / step, rel=1e-4)


@pytest.mark.parametrize(("width", "tolerance"), [(0.05, 1e-4), (0.1, 1e-4), (0.07, 0.005), (0.15, 0.01), (0.03, 0.05)])
def test_a_combination_of_snapshots_is_the_tracked_average(walk, width, tolerance):
    """Tolerances are relative to the parameters' root mean square; 0.05 and 0.1 are stored themselves."""
    snapshots = np.stack([tracked(walk, profile) for profile in ema.PROFILES.values()], axis=1)
    steps = range(EVERY, STEPS + 1, EVERY)
    weights, error = ema.combine(steps, width)
    combined = np.einsum("sp,spd->d", weights, snapshots[[step - 1 for step in steps]])
    direct = tracked(walk, width)[-1]
    assert np.sqrt(np.mean((combined - direct) ** 2)) <= tolerance * np.sqrt(np.mean(direct**2))
    assert error < 0.2
    if width in ema.PROFILES.values():
        assert error < 1e-6


def test_the_error_says_when_snapshots_are_too_few():
    errors = [ema.combine(range(400 // n, 401, 400 // n), 0.15).error for n in (1, 4, 20)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01
    few = ema.combine([400], 0.02)
    assert few.error > 0.3 and few.weights.sum() == pytest.approx(1)
