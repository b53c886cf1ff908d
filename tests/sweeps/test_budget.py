"""Steps that follow from budgets, compared with counts by hand."""

import pytest

from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError
from madformer_jax.sweeps import budget
from madformer_jax.sweeps.budget import Timing
from tests import tiny


@pytest.fixture
def c():
    c = tiny.get_config()  # N = 3, D = 1, batch 8
    c.sample.guidance = 1.0
    return c


def test_training_steps(c):
    assert budget.train_steps(c, "steps", 70) == 70
    assert budget.train_steps(c, "images", 60) == 8  # 7.5 batches of 8
    step = flops.training_step(c).total
    assert budget.train_steps(c, "flops", 5.4 * step) == 5
    c.train.steps = 5
    assert budget.training_flops(c) == 5 * step


@pytest.mark.parametrize(
    ("depth", "guidance", "nfe", "steps"),
    [
        (1, 1.0, 4, 10),  # (2 + 1 * 10) / 3
        (2, 1.0, 4, 5),  # (1 + 2 * 5.5) / 3: 6 steps would cost 4.33
        (3, 1.0, 4, 4),
        (3, 2.0, 4, 2),  # each step twice
        (1, 2.0, 4, 4),  # 2 (2 + 4) / 3
    ],
)
def test_solver_steps_of_the_papers_nfe(c, depth, guidance, nfe, steps):
    c.model.diffusion_depth, c.sample.guidance = depth, guidance
    assert budget.solver_steps(c, "nfe", nfe) == steps


@pytest.mark.parametrize(
    ("changes", "passes", "steps"),
    [
        ({"diffusion_depth": 1}, 4.75, 10),  # (2 + 10) / 3, and the clean tower in three of four blocks
        ({"diffusion_depth": 3}, 4.75, 4),
        ({"diffusion_depth": 3, "clean_stream": False}, 4, 4),
        ({"diffusion_depth": 3, "blocks": 1}, 4, 4),
    ],
)
def test_solver_steps_of_passes_leave_room_for_the_clean_tower(c, changes, passes, steps):
    c.model.update(changes)
    assert budget.solver_steps(c, "passes", passes) == steps


def test_solver_steps_follow_from_the_evaluations_and_the_path(c):
    """Heun's last step has one evaluation, and a continuous path has more than 999 steps."""
    c.sample.solver = "heun"
    assert budget.solver_steps(c, "nfe", (2 + 19) / 3) == 10
    c.sample.solver, c.diffusion.path = "euler", "flow"
    assert budget.solver_steps(c, "nfe", (2 + 3000) / 3) == 3000
    c.diffusion.path = "ddpm"
    assert budget.solver_steps(c, "steps", 900) == 900
    with pytest.raises(ConfigError, match="with 999 steps"):
        budget.solver_steps(c, "steps", 3000)


def test_solver_steps_of_other_budgets(c):
    assert budget.solver_steps(c, "steps", 7) == 7
    c.sample.steps = 9
    assert budget.solver_steps(c, "flops", 1.01 * flops.sampling(c).total) == 9
    for seconds in (0.52, 0.58):  # 5 steps come nearer to the second budget, but lie above it
        assert budget.solver_steps(c, "seconds", seconds, Timing(fixed=0.1, per_step=0.1)) == 4


def test_training_flops_leave_out_the_codec(c):
    before = budget.training_flops(c)
    c.codec.name = "vae"
    assert budget.training_flops(c) < flops.training_step(c).total * c.train.steps
    assert before != budget.training_flops(c)  # the latents have another shape


@pytest.mark.parametrize(
    ("kind", "amount", "message"),
    [
        ("nfe", 0.2, "0.2 nfe are out of reach: the nearest is 1, with 1 steps"),
        ("passes", 0.2, "0.2 passes are out of reach: the nearest is 1.75, with 1 steps"),
        ("hours", 1, "'hours' is not a kind"),
    ],
)
def test_a_budget_out_of_reach_is_an_error(c, kind, amount, message):
    with pytest.raises(ConfigError, match=message):
        budget.solver_steps(c, kind, amount)
    with pytest.raises(ConfigError, match="is not a kind: use one of steps, images, flops"):
        budget.train_steps(c, "passes", 1)
