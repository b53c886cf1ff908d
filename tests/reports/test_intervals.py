"""Intervals: against printed quantiles, and by simulation that "clear" fires falsely in at most 5 % of tables."""

import numpy as np
import pytest

from madformer_jax.reports import comparisons, intervals
from madformer_jax.reports.axes import Axis
from madformer_jax.reports.intervals import Estimate
from madformer_jax.reports.results import Budget, Point, ProtocolGroup, Score

SIMULATIONS = 200
BUDGETS = [Budget("nfe", amount) for amount in (2, 4, 8)]


def plateau_group(random, seeds):
    """Returns four D whose scores differ by noise alone: seeds shared by all, models, and single scores."""
    shared, points = random.standard_normal(seeds), []
    for d in (1, 2, 3, 4):
        model = random.standard_normal(seeds)
        for steps in (2, 4, 8):
            noise = random.standard_normal(seeds)
            for seed in range(seeds):
                value = 10 + 2 * shared[seed] + model[seed] + 0.5 * noise[seed]
                cost = {"solver_steps": steps, "nfe": steps * d / 4}
                points.append(Point((d,), seed, Budget("steps", steps), f"{d}-{seed}", 0, cost, {"KID": Score(value)}))
    return ProtocolGroup("", (Axis("model.diffusion_depth", (1, 2, 3, 4)),), tuple(points), {})


def clear_tables(group):
    """Returns whether each table of the report has a clear cell, and whether one would by intervals of single cells."""
    table = [d for row in comparisons.differences_at_best_steps(group, "KID", BUDGETS).values() for d in row]
    curves = comparisons.find_crossings(group, "KID", BUDGETS)
    return (
        any(d.estimate.sign for d in table),
        any(c.clear[0] for c in curves),
        any(intervals.estimate(d.estimate.values).sign for d in table),
    )


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_table_of_plateaus_is_clear_in_at_most_5_percent(seeds, monkeypatch):
    """The intervals of single differences, the rule of earlier reports, fail this test."""
    monkeypatch.setattr(intervals, "_DRAWS", 1000)
    intervals._normal_draws.cache_clear()
    random = np.random.default_rng(42)
    fired = np.mean([clear_tables(plateau_group(random, seeds)) for _ in range(SIMULATIONS)], 0)
    intervals._normal_draws.cache_clear()
    table, curves, single = fired
    assert table <= 0.05
    assert curves <= 0.05
    assert single > 0.1


def test_holm_rejects_as_the_step_down_test_does():
    """p-values 0.0126, 0.0198 and 0.0390 of three cells: Holm compares with 0.0167, 0.025 and 0.05."""
    cells = [[t * 3**0.5 / 3**0.5 + e for e in (-1, 0, 1)] for t in (5.1, 4.0, 2.8)]  # sd 1, n = 3
    found = intervals.holm(cells)
    p = [intervals._p_value(x) for x in cells]
    steps = [
        p[0] < 0.05 / 3,
        p[0] < 0.05 / 3 and p[1] < 0.05 / 2,
        all(a < b for a, b in zip(p, (0.05 / 3, 0.025, 0.05))),
    ]
    assert [bool(x.sign) for x in found] == steps
    half = 7.648852 / 3**0.5  # t(1 - 0.05 / 6, 2)
    assert found[0].high - found[0].mean == pytest.approx(half, rel=1e-5)


def test_one_cell_has_students_interval_and_one_seed_has_none():
    assert intervals.holm([[1.0, 2.0, 6.0]]) == [intervals.estimate([1.0, 2.0, 6.0])]
    assert intervals.holm([[1.0]]) == [Estimate((1.0,), 1.0, None, None)]


def test_a_band_lies_between_students_and_bonferronis_intervals():
    random = np.random.default_rng(0)
    shared = random.standard_normal((8, 1))
    alike = (shared + 1e-3 * random.standard_normal((8, 6))).T  # points that move together
    free = random.standard_normal((6, 8))

    def factor(points):
        band, student = intervals.max_t(points)[0], intervals.estimate(points[0])
        return (band.high - band.mean) / (student.high - student.mean)

    bonferroni = intervals._t_quantile(7, 0.05 / 6) / intervals._t_quantile(7, 0.05)
    assert 1 <= factor(alike) < factor(free) <= bonferroni


def test_equal_values_are_clear_only_away_from_0():
    zero, one = intervals.holm([[0.0] * 3, [1.0] * 3])
    assert (zero.sign, one.sign) == (0, 1)


def test_a_band_of_differences_that_are_equal_up_to_rounding():
    row = [(0.01 * seed - 0.1) - (0.01 * seed - 0.2) for seed in range(3)]
    assert len(set(row)) == 3
    band = intervals.max_t([row, row])
    assert [x.mean for x in band] == pytest.approx([0.1, 0.1]) and all(x.sign == 1 for x in band)
