import numpy as np
import pytest

from madformer_jax.config import choices
from madformer_jax.diffusion import schedule, solvers

PATHS = {name: schedule.make(name) for name in choices.NOISE_PATHS}
DDPM, FLOW, COSINE = (PATHS[name] for name in ("ddpm", "flow", "cosine"))


def no_noise():
    raise AssertionError("a deterministic solver draws no noise")


def run(solver, t, path, x, denoise, normal=no_noise):
    """Solves from x in float64 with a denoiser (x, level) -> x0."""
    table = solver.table(path, t)
    state = solvers.SolverState(x, 0 * x, 0 * x)
    for row in solvers.evaluation_rows(table):
        state, _ = solver.step(lambda x, level: (denoise(x, level), None), state, row, normal)
    assert len(table.index) == solver.evaluations(len(t) - 1)
    return state.x


# ---- diffusers


def denoise(x, level):
    eps = 0.3 * x * np.cos(level.t / 1000) + 0.1 * np.sin(3 * x)
    return (x - level.sigma * eps) / level.alpha


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_solvers_on_the_ddpm_path_equal_diffusers(reference, name, spacing):
    file = reference("samplers.npz")
    solver = solvers.make(name)

    counts = sorted({int(key.split("/")[2]) for key in file.files if key.startswith(f"{name}/{spacing}/")})
    assert len(counts) > 4
    for n in counts:
        t = DDPM.solver_timesteps(spacing, n, solver.skip_zero)
        np.testing.assert_array_equal(t[:-1], file[f"{name}/{spacing}/{n}/timesteps"])
        expected = file[f"{name}/{spacing}/{n}/x_0"]
        x = run(solver, t, DDPM, file["x_T"], denoise)
        assert np.linalg.norm(x - expected) < 1e-5 * np.linalg.norm(expected), n


def test_ancestral_steps_equal_the_ddpm_scheduler_of_diffusers(reference):
    file = reference("paths.npz")
    noise = iter(file["ddpm/noise"])

    t = DDPM.solver_timesteps("trailing", 10)
    np.testing.assert_array_equal(t[:-1], file["ddpm/timesteps"])
    x = run(solvers.make("ancestral"), t, DDPM, file["x_T"], denoise, lambda: next(noise))
    np.testing.assert_allclose(x, file["ddpm/x_0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_euler_and_heun_on_the_flow_path_equal_diffusers(reference, name):
    file = reference("paths.npz")
    keys = sorted({key.rpartition("/")[0] for key in file.files if key.startswith(f"{name}/")})
    assert len(keys) >= 3

    def denoise_flow(x, level):
        return x - level.sigma * (0.5 * x * np.cos(level.sigma) + 0.2 * np.sin(3 * x))

    for key in keys:
        solver, steps = solvers.make(name), int(key.split("/")[1])
        u = file[f"{key}/sigmas"] if name == "euler" else np.append(np.unique(file[f"{key}/timesteps"])[::-1] / 1000, 0)
        if name == "euler":  # our timesteps are as far from theirs as 999 from 1000
            path = schedule.make("flow", shift=float(key.split("/")[2]))
            np.testing.assert_allclose((path.solver_timesteps("trailing", steps) + 0.5) / 1000, u, atol=6e-4)
        x = run(solver, 1000 * u - 0.5, FLOW, file["x_T"], denoise_flow)
        np.testing.assert_allclose(x, file[f"{key}/x_0"], rtol=1e-5, atol=1e-6, err_msg=key)


# ---- Gaussian data, whose denoiser and probability flow are known in closed form

_RNG = np.random.default_rng(0)
MEAN, STD, X_T = _RNG.normal(size=50), _RNG.uniform(0.3, 1.5, 50), _RNG.standard_normal(50)


def gaussian_denoiser(x, level):
    """Computes E[z | x] of data with mean MEAN and standard deviation STD."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def gaussian_image(path, t):
    """The end of the probability flow that starts at X_T at timestep t."""
    level = path.level(np.array([t]))
    return MEAN + STD * (X_T - level.alpha * MEAN) / np.sqrt(level.alpha**2 * STD**2 + level.sigma**2)


def even_timesteps(path, steps, variable):
    """Timesteps evenly spaced in the variable in which a solver integrates: tau, or half the log-SNR."""
    fine = np.arange(1000) if path is DDPM else np.linspace(-0.499, 999, 1_000_000)
    level = path.level(fine)
    if variable == "tau":
        values = path.velocity_time(level.alpha, level.sigma)
        t = np.interp(np.linspace(values[-1], 0, steps + 1)[:-1], values, fine)
    else:
        values = np.log(level.sigma / level.alpha)
        t = np.interp(np.linspace(values[-1], values[0], steps), values, fine)
    return np.append(np.rint(t).astype(int) if path is DDPM else t, path.clean)


# (solver, path) -> variable, two numbers of steps, order. The DDPM path has 1000 timesteps, so few steps.
ORDERS = {
    ("ddim", DDPM): ("snr", 20, 40, 1),
    ("ddim", FLOW): ("snr", 80, 160, 1),
    ("ddim", COSINE): ("snr", 80, 160, 1),
    ("euler", DDPM): ("tau", 40, 100, 1),
    ("euler", FLOW): ("tau", 80, 160, 1),
    ("euler", COSINE): ("tau", 80, 160, 1),
    ("heun", DDPM): ("tau", 10, 40, 2),
    ("heun", FLOW): ("tau", 80, 160, 2),
    ("heun", COSINE): ("tau", 80, 160, 2),
    ("dpmpp_2m", DDPM): ("tau", 5, 20, 2),
    ("dpmpp_2m", FLOW): ("snr", 80, 160, 2),
    ("dpmpp_2m", COSINE): ("snr", 80, 160, 2),
}


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: f"{case[0]}-{type(case[1]).__name__}")
def test_every_solver_converges_to_the_image_of_the_flow_at_its_order(case):
    (name, path), (variable, few, many, order) = case, ORDERS[case]
    errors = []
    for steps in (few, many):
        t = even_timesteps(path, steps, variable)
        expected = gaussian_image(path, t[0])
        errors.append(np.linalg.norm(run(solvers.make(name), t, path, X_T, gaussian_denoiser) - expected))
    assert errors[1] < 0.05 * np.linalg.norm(expected)
    assert np.log(errors[0] / errors[1]) / np.log(many / few) == pytest.approx(order, abs=0.1)


def test_the_image_is_the_same_on_every_path():
    images = [gaussian_image(path, path.solver_timesteps("trailing", 1)[0]) for path in (DDPM, FLOW, COSINE)]
    for image in images[1:]:
        assert np.linalg.norm(image - images[0]) < 0.01 * np.linalg.norm(images[0])


@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: type(path).__name__)
def test_ancestral_samples_have_the_mean_and_the_variance_of_the_data(path):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 50))
    t = path.solver_timesteps("trailing", 400)
    samples = run(solvers.make("ancestral"), t, path, x, gaussian_denoiser, lambda: rng.standard_normal(x.shape))
    standardized = (samples - MEAN) / STD
    np.testing.assert_allclose(standardized.mean(0), 0, atol=0.2)
    np.testing.assert_allclose(standardized.std(0), 1, atol=0.15)
    assert abs(standardized.mean()) < 0.02
    assert standardized.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: type(path).__name__)
def test_each_ancestral_step_ends_on_the_path_of_a_known_image(path):
    """With the true image as estimate, x_s must be alpha_s z + sigma_s noise after every step."""
    solver = solvers.make("ancestral")
    rng = np.random.default_rng(2)
    t = path.solver_timesteps("trailing", 5)
    x = rng.standard_normal((20000, 1))
    start, z = path.level(t[:1]), 0.7
    state = solvers.SolverState(start.alpha * z + start.sigma * x, x, x)
    for k, row in enumerate(solvers.evaluation_rows(solver.table(path, t))):
        state, _ = solver.step(
            lambda x, level: (np.full_like(x, z), None), state, row, lambda: rng.standard_normal(x.shape)
        )
        level = path.level(t[k + 1 : k + 2])
        assert state.x.mean() == pytest.approx(level.alpha * z, abs=0.02)
        assert state.x.std() == pytest.approx(level.sigma, abs=0.02)


def test_euler_is_ddim_on_the_flow_path_but_not_on_others():
    for path, same in ((DDPM, False), (FLOW, True), (COSINE, False)):
        euler, ddim = (solvers.make(name).coefficients(path, "trailing", 6) for name in ("euler", "ddim"))
        assert np.allclose(euler.x_weight, ddim.x_weight, atol=1e-6) == same


def test_heun_evaluates_the_end_of_each_step_but_the_last():
    rows = solvers.make("heun").coefficients(DDPM, "trailing", 4)
    assert rows.level.t.tolist() == [999, 749, 749, 499, 499, 249, 249]
    assert rows.level.t.dtype == np.int32 and rows.x_weight.dtype == np.float32


def test_a_name_of_a_solver_and_a_path_has_a_class():
    for name in choices.SOLVERS:
        assert isinstance(solvers.make(name), solvers.Solver)
    for name in choices.NOISE_PATHS:
        assert isinstance(schedule.make(name), schedule.Schedule)
    with pytest.raises(ValueError, match="karras"):
        solvers.make("ddim").coefficients(DDPM, "karras", 4)
    with pytest.raises(ValueError, match="leading"):
        solvers.make("ddim").coefficients(FLOW, "leading", 4)
