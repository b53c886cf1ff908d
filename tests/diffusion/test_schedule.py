import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import choices
from madformer_jax.diffusion import schedule

PATHS = {name: schedule.make(name) for name in choices.NOISE_PATHS}
DDPM, FLOW, COSINE = (PATHS[name] for name in ("ddpm", "flow", "cosine"))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("skip_zero", [False, True])
def test_ddpm_timesteps_fall_to_the_clean_latent_in_the_number_of_steps(skip_zero, spacing):
    for n in [*range(1, 60), 95, 100, 250, 333, 499, 500]:
        t = DDPM.solver_timesteps(spacing, n, skip_zero)
        assert len(t) == n + 1
        assert (np.diff(t) < 0).all()
        assert t[0] <= 999
        assert t[-2] >= 0 and t[-1] == -1


def test_trailing_starts_at_pure_noise():
    for path in (*PATHS.values(), schedule.make("flow", shift=3.0)):
        for n in (1, 7, 20):
            assert path.solver_timesteps("trailing", n)[0] == pytest.approx(999)


def test_alphas_cumprod_equal_the_references(reference):
    np.testing.assert_allclose(schedule.alphas_cumprod(), reference("samplers.npz")["alphas_cumprod"], rtol=1e-5)


def test_timesteps_of_a_few_steps():
    assert [DDPM.solver_timesteps("trailing", n).tolist() for n in (1, 2, 4)] == [
        [999, -1],
        [999, 499, -1],
        [999, 749, 499, 249, -1],
    ]
    assert DDPM.solver_timesteps("leading", 4).tolist() == [750, 500, 250, 0, -1]
    release = DDPM.solver_timesteps("leading", 250, skip_zero=True)  # section 4: t = 750, 747 ... 3
    assert (release[0], release[1], release[-2]) == (750, 747, 3)


def test_continuous_paths_have_any_number_of_steps():
    t = FLOW.solver_timesteps("trailing", 5000)
    assert len(t) == 5001 and (np.diff(t) < 0).all() and t[-1] == FLOW.clean
    # In u the steps are even, and the shift s maps u to s u / (1 + (s - 1) u).
    u = (schedule.make("flow", shift=3.0).solver_timesteps("trailing", 4) + 0.5) / 999.5
    np.testing.assert_allclose(u, [1, 3 * 0.75 / 2.5, 3 * 0.5 / 2, 3 * 0.25 / 1.5, 0])


def test_add_noise_uses_the_timestep_of_each_block():
    rng = np.random.default_rng(1)
    z, noise = rng.normal(size=(2, 2, 3, 1)), rng.normal(size=(2, 2, 3, 1))
    t = np.array([[0, 999], [500, 17]])
    betas = np.linspace(1e-4, 2e-2, 1000)
    noisy = DDPM.add_noise(jnp.asarray(z), jnp.asarray(noise), jnp.asarray(t))
    for b in range(2):
        for i in range(2):
            alpha_bar = np.prod(1 - betas[: t[b, i] + 1])
            expected = np.sqrt(alpha_bar) * z[b, i] + np.sqrt(1 - alpha_bar) * noise[b, i]
            np.testing.assert_allclose(noisy[b, i], expected, rtol=1e-4, atol=1e-5)


def test_flow_is_the_straight_line_and_cosine_that_of_diffusers(reference):
    t = np.linspace(0, 999, 50)
    alpha, sigma = FLOW.alpha_sigma(t)
    np.testing.assert_allclose((alpha, sigma), (1 - (t + 0.5) / 1000, (t + 0.5) / 1000), rtol=1e-12)
    # Timestep t of diffusers' discrete path is at u = (t + 1) / 1000, where ours is t + 0.5.
    expected = reference("paths.npz")["cosine/alphas_cumprod"][:990]
    np.testing.assert_allclose(COSINE.alpha_sigma(np.arange(990) + 0.5)[0] ** 2, expected, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: type(path).__name__)
def test_levels_in_float32_equal_those_in_float64_at_both_ends(path):
    t = np.array([0, 1, 500, 998, 999])
    exact, single = path.level(t), path.level(jnp.asarray(t, path.dtype))
    for name in ("alpha", "sigma", "v_noise", "v_clean"):
        np.testing.assert_allclose(getattr(single, name), getattr(exact, name), rtol=2e-4 if path is DDPM else 2e-6)
    clean = path.level(np.array([path.clean]))
    assert (clean.alpha[0], clean.sigma[0]) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: type(path).__name__)
def test_v_is_the_velocity_of_the_path(path):
    """Dx / dtau by differences; on the DDPM path between two neighboring timesteps."""
    t = np.array([100, 400, 900]) if path is DDPM else np.array([0.5, 400.25, 998])
    step = 1 if path is DDPM else 1e-4
    before, level, after = (path.level(t + k * step) for k in (-1, 0, 1))
    tau = [path.velocity_time(x.alpha, x.sigma) for x in (before, after)]
    rate = {name: (getattr(after, name) - getattr(before, name)) / (tau[1] - tau[0]) for name in ("alpha", "sigma")}
    np.testing.assert_allclose(level.v_noise, rate["sigma"], rtol=1e-3)
    np.testing.assert_allclose(-level.v_clean, rate["alpha"], rtol=1e-3)
    np.testing.assert_allclose(level.v_noise * level.alpha + level.v_clean * level.sigma, 1, rtol=1e-9)


def test_training_timesteps_have_the_distribution_of_the_config():
    """Quantiles of u: uniform, the sigmoid of a normal, and shifted."""
    key, quantiles = jax.random.key(0), np.array([0.1, 0.5, 0.9])
    logit_normal = 1 / (1 + np.exp(-np.array([-1.28155, 0, 1.28155])))
    for settings, expected in (
        (("uniform", 1.0), quantiles),
        (("logit_normal", 1.0), logit_normal),
        (("logit_normal", 3.0), 3 * logit_normal / (1 + 2 * logit_normal)),
    ):
        t = schedule.make("flow", *settings).training_timesteps(key, (20_000,))
        assert t.dtype == jnp.float32 and t.min() >= 0 and t.max() <= 999
        np.testing.assert_allclose(np.quantile(t, quantiles) / 999, expected, atol=0.012)
    np.testing.assert_array_equal(DDPM.training_timesteps(key, (9,)), jax.random.randint(key, (9,), 0, 1000))
    context = FLOW.uniform_timesteps(key, (1000,), 300)
    assert 0 <= context.min() < 10 and 290 < context.max() <= 300


def test_the_ddpm_path_has_no_shift():
    with pytest.raises(ValueError, match="uniform timesteps without a shift"):
        schedule.make("ddpm", shift=2.0)
