import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import solvers


def _eps(x, t):
    return 0.3 * x * jnp.cos(t / 1000) + 0.1 * jnp.sin(3 * x)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_solvers_equal_diffusers(reference, solver, spacing):
    file = reference("samplers.npz")
    counts = sorted({int(name.split("/")[2]) for name in file.files if name.startswith(f"{solver}/{spacing}/")})
    assert len(counts) > 4
    for n in counts:
        table = solvers.coefficients(solver, spacing, n)
        np.testing.assert_array_equal(table.t, file[f"{solver}/{spacing}/{n}/timesteps"])

        def step(state, row):
            return solvers.step(state, _eps(state.x, row.t), row), None

        start = solvers.initial_state(jnp.asarray(file["x_T"]))
        state, _ = jax.lax.scan(step, start, jax.tree.map(jnp.asarray, table))
        expected = file[f"{solver}/{spacing}/{n}/x_0"]
        assert np.linalg.norm(state.x - expected) < 1e-5 * np.linalg.norm(expected), n


def test_clip_x0_bounds_the_clean_estimate():
    table = solvers.coefficients("ddim", "trailing", 2)
    row = jax.tree.map(lambda r: r[-1], table)
    x, eps = jnp.full((3,), 5.0), jnp.full((3,), -2.0)
    assert float(solvers.step(solvers.initial_state(x), eps, row).x.max()) > 1
    np.testing.assert_allclose(solvers.step(solvers.initial_state(x), eps, row, clip_x0=1.0).x, 1.0, rtol=1e-6)


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="euler"):
        solvers.coefficients("euler", "trailing", 4)
    with pytest.raises(ValueError, match="karras"):
        solvers.coefficients("ddim", "karras", 4)
