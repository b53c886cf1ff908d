import numpy as np
import pytest

from madformer_jax.diffusion import guidance, schedule

T = schedule.DEFAULT.solver_timesteps("trailing", 5)[:-1]  # 999, 799, 599, 399, 199


def test_interval_includes_both_ends_and_other_steps_have_scale_1():
    np.testing.assert_array_equal(guidance.guidance_scales(3.0, "constant", (399, 799), T), [1, 3, 3, 3, 1])
    np.testing.assert_array_equal(guidance.guidance_scales(3.0, "constant", (400, 798), T), [1, 1, 3, 1, 1])
    np.testing.assert_array_equal(guidance.guidance_scales(3.0, "linear", (0, 799), T), [1, 1.5, 2, 2.5, 3])
    np.testing.assert_array_equal(guidance.guidance_scales(3.0, "linear", (599, 599), T), [1, 1, 2, 1, 1])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_interval_around_all_steps_changes_no_bit(schedule):
    everywhere, around = (guidance.guidance_scales(1.7, schedule, interval, T) for interval in ((0, 999), (199, 999)))
    assert everywhere.dtype == np.float32
    np.testing.assert_array_equal(everywhere, around)
    if schedule == "constant":
        np.testing.assert_array_equal(everywhere, np.float32([1.7] * 5))


def test_linear_schedule_goes_from_1_to_the_scale():
    for scale, steps in ((2.0, 1), (2.0, 2), (0.0, 3), (7.5, 50)):
        w = guidance.guidance_scales(scale, "linear", (0, 999), np.arange(steps)[::-1])
        assert w[-1] == scale and (steps == 1 or w[0] == 1)
        np.testing.assert_allclose(np.diff(w, 2), 0, atol=1e-6)


def test_both_evaluations_at_a_timestep_have_one_scale():
    t = np.array([999, 749, 749, 499, 499, 249, 249])  # of Heun
    np.testing.assert_array_equal(guidance.guidance_scales(4.0, "linear", (0, 999), t), [1, 2, 2, 3, 3, 4, 4])
    fine = np.array([999, 0.3, -0.2])  # of a continuous path
    np.testing.assert_array_equal(guidance.guidance_scales(4.0, "constant", (0, 999), fine), [4, 4, 4])
