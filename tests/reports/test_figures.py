import re

import pytest

from madformer_jax.reports import difference_figures, figures, formatting, intervals
from madformer_jax.reports.axes import Axis
from madformer_jax.reports.results import Budget, Point, ProtocolGroup, Score
from tests.reports import made_up


def load_group(folder, **settings):
    return made_up.load_group(folder, seeds=(0, 1), scores=("KID-classifier",), **settings)


def texts(panel):
    return re.findall(r">([^<>]+)</text>", panel.svg.decode())


def test_a_heat_map_has_every_cells_mean(tmp_path):
    group = load_group(tmp_path, depths=(1, 8), blocks=(1, 4), steps=(64,))
    panel = figures.heat_map(group, "KID-classifier", *group.axes, group.budgets[0])
    assert panel.name == "kid-classifier-heat-steps-64"
    for depth in (1, 8):
        for blocks in (1, 4):
            mean = sum(made_up.score(depth, 64, seed, blocks) for seed in (0, 1)) / 2
            assert formatting.format_number(mean) in texts(panel)


def test_a_curve_for_each_depth_and_a_panel_for_each_number_of_blocks(tmp_path):
    group = load_group(tmp_path, depths=(1, 8), blocks=(1, 4), steps=(2, 64))
    panels = figures.cost_curves(group, "KID-classifier", "passes", group.axes[0])
    assert [panel.name for panel in panels] == ["kid-classifier-passes-l1", "kid-classifier-passes-l4"]
    assert {"KID-classifier ↓, L = 4", "D = 1", "D = 8", "full-model passes per image", "digits, 256 px"} <= set(
        texts(panels[1])
    )
    assert b"<dc:date>" not in panels[0].svg


def test_a_cost_that_was_not_measured_has_no_panel(tmp_path):
    group = load_group(tmp_path, depths=(1, 8), steps=(2, 64), measured=False)
    assert figures.cost_curves(group, "KID-classifier", "seconds", group.axes[0]) == []


def test_one_budget_has_a_figure_by_value_and_none_by_cost(tmp_path):
    group = load_group(tmp_path, depths=(1, 8), steps=(2,))
    assert figures.cost_curves(group, "KID-classifier", "solver_steps", group.axes[0]) == []
    (panel,) = figures.axis_plots(group, "KID-classifier", group.axes[0])
    assert panel.name == "kid-classifier-by-d"
    assert {"1", "8", "D", "KID-classifier ↓, at 2 steps"} <= set(texts(panel))


def test_scores_that_differ_on_real_images_share_no_panel():
    """Real images have another seam score for each L, so that only curves of the same L share a panel."""
    real = {4: intervals.estimate([1.8]), 16: intervals.estimate([1.4])}
    points = tuple(
        Point((d, n), 0, Budget("steps", steps), "run", 0, {"solver_steps": steps}, {"seam": Score(2.0, real=real[n])})
        for d in (1, 2) for n in (4, 16) for steps in (2, 8)
    )  # fmt: skip
    depths, blocks = Axis("model.diffusion_depth", (1, 2)), Axis("model.blocks", (4, 16))
    group = ProtocolGroup("", (depths, blocks), points, {})
    assert len(figures.cost_curves(group, "seam", "solver_steps", depths)) == 2  # one for each L
    assert not figures.cost_curves(group, "seam", "solver_steps", blocks)
    assert not figures.cost_curves(group, "seam", "solver_steps")
    assert len(figures.axis_plots(group, "seam", depths)) == 2
    assert not figures.axis_plots(group, "seam", blocks)


@pytest.mark.parametrize(("low", "high", "ticks"), [(1, 20, [1, 2, 5, 10, 20]), (21.04, 49, [21, 49]), (3, 6, [3, 6])])
def test_an_axis_has_at_least_two_ticks(low, high, ticks):
    assert figures._round_ticks(low, high) == ticks


def test_more_ablations_than_colors_all_have_a_line(tmp_path):
    off = {f"d{d}l4s0": {"model.diffusion_depth": 1, f"model.field{d}": False} for d in range(2, 11)}
    settings = {"depths": range(1, 11), "seeds": (0,), "steps": (2, 4), "scores": ("KID-classifier",), "extra": off}
    group = made_up.load_group(tmp_path, **settings)
    panel = difference_figures.difference_bands(group, "KID-classifier", group.budgets)
    assert {f"no field{d}" for d in range(2, 11)} <= set(texts(panel))
