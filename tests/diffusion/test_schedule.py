import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import schedule


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_number_of_steps_and_each_step_ends_where_the_next_begins(solver, spacing):
    for n in [*range(1, 60), 95, 100, 250, 333, 499, 500]:
        t, next_t = schedule.solver_timesteps(solver, spacing, n)
        assert len(t) == n
        assert (np.diff(t) < 0).all()
        assert t[0] <= 999
        assert t[-1] >= 0
        np.testing.assert_array_equal(next_t, [*t[1:], -1])


def test_trailing_starts_at_pure_noise():
    for solver in ("ddim", "dpmpp_2m"):
        for n in (1, 7, 20):
            assert schedule.solver_timesteps(solver, "trailing", n).t[0] == 999


def test_alphas_cumprod_equal_the_references(reference):
    np.testing.assert_allclose(schedule.alphas_cumprod(), reference("samplers.npz")["alphas_cumprod"], rtol=1e-5)


def test_timesteps_of_a_few_steps():
    assert [schedule.solver_timesteps("ddim", "trailing", n).t.tolist() for n in (1, 2, 4)] == [
        [999],
        [999, 499],
        [999, 749, 499, 249],
    ]
    assert schedule.solver_timesteps("ddim", "leading", 4).t.tolist() == [750, 500, 250, 0]
    release = schedule.solver_timesteps("dpmpp_2m", "leading", 250).t  # section 4: t = 750, 747 ... 3
    assert (release[0], release[1], release[-1]) == (750, 747, 3)


def test_add_noise_uses_the_timestep_of_each_block():
    rng = np.random.default_rng(1)
    z, noise = rng.normal(size=(2, 2, 3, 1)), rng.normal(size=(2, 2, 3, 1))
    t = np.array([[0, 999], [500, 17]])
    betas = np.linspace(1e-4, 2e-2, 1000)
    for b in range(2):
        for i in range(2):
            alpha_bar = np.prod(1 - betas[: t[b, i] + 1])
            expected = np.sqrt(alpha_bar) * z[b, i] + np.sqrt(1 - alpha_bar) * noise[b, i]
            np.testing.assert_allclose(
                schedule.add_noise(z, noise, jnp.asarray(t))[b, i], expected, rtol=1e-4, atol=1e-5
            )
