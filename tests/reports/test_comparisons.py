import pytest

from madformer_jax.reports import comparisons, results, tables
from madformer_jax.reports.axes import Axis
from madformer_jax.reports.results import Budget, Point, ProtocolGroup, Score


def make_group(curves, cost="solver_steps"):
    """Returns a group from {D: {seed: {steps: score}}}. The passes are D times the steps."""
    points = [
        Point(
            (d,), seed, Budget("steps", steps), f"{d}-{seed}", 0,
            {"solver_steps": steps, "passes": d * steps, "flops": 1e9 * d * steps}, {"KID": Score(value)},
        )
        for d, seeds in curves.items() for seed, values in seeds.items() for steps, value in values.items()
    ]  # fmt: skip
    return ProtocolGroup("", (Axis("model.diffusion_depth", tuple(curves)),), tuple(points), {})


SMALL = {seed: {2: 5 + 0.1 * seed, 8: 4 + 0.1 * seed, 32: 3 + 0.1 * seed} for seed in range(3)}


def large(*by):
    """Returns SMALL improved by `by` at each number of steps, with a small variation between seeds."""
    return {
        seed: {steps: value - b + 0.01 * (seed - 1) for (steps, value), b in zip(values.items(), by)}
        for seed, values in SMALL.items()
    }


def test_a_crossing_outside_of_the_intervals_is_shown():
    (found,) = comparisons.find_crossings(make_group({1: SMALL, 2: large(-1, -0.5, 0.5)}), "KID", "solver_steps")
    assert (found.verdict, found.clear) == ("shown", (3, 3))
    assert (found.before.cost, found.after.cost) == (8, 32)
    assert found.equal_cost == pytest.approx(16)  # halfway in the logarithm
    assert found.before.improvement.mean == pytest.approx(0.5)  # the lead of the first setting
    assert found.before.improvement.high - found.before.improvement.mean == pytest.approx(4.302653 * 0.01 / 3**0.5)


def test_pairing_by_seed_makes_the_interval_that_of_the_differences():
    """Each seed shifts both curves by ten times the difference. Unpaired intervals would include 0."""
    shifted = {s: {n: v + s for n, v in values.items()} for s, values in SMALL.items()}
    other = {s: {n: v + s for n, v in values.items()} for s, values in large(-0.1, 0.05, 0.1).items()}
    (found,) = comparisons.find_crossings(make_group({1: shifted, 2: other}), "KID", "solver_steps")
    assert found.verdict == "shown"


def test_means_that_cross_within_their_intervals_show_nothing():
    (found,) = comparisons.find_crossings(make_group({1: SMALL, 2: large(-1, 0.005, 0.002)}), "KID", "solver_steps")
    assert found.verdict == "means only"
    assert (found.before.cost, found.after.cost) == (2, 8)


def test_one_seed_is_never_clear():
    (found,) = comparisons.find_crossings(
        make_group({1: {0: SMALL[0]}, 2: {0: large(-1, 0, 1)[0]}}), "KID", "solver_steps"
    )
    assert (found.verdict, found.clear) == ("means only", (0, 3))


def test_curves_that_keep_their_order():
    (found,) = comparisons.find_crossings(make_group({1: SMALL, 2: large(1, 0.5, 0.1)}), "KID", "solver_steps")
    assert (found.verdict, found.equal_cost) == ("none", None)


def test_costs_that_differ_are_compared_where_both_curves_have_a_value():
    """Curves that cross by steps do not by passes: the second setting's steps cost twice as much."""
    group = make_group({1: SMALL, 2: large(-1, -0.5, 0.5)})
    one, two = (comparisons.seed_curves(group, (d,), "KID", "passes") for d in (1, 2))
    assert [d.cost for d in comparisons.paired_differences(one, two, -1)] == [4, 8, 16, 32]
    (found,) = comparisons.find_crossings(group, "KID", "passes")
    assert (found.verdict, found.after.cost) == ("none", 32)
    assert found.after.improvement.mean == pytest.approx(
        0.5
    )  # 3.5, interpolated between the points of the second setting, minus 3


def test_higher_is_better_for_shares():
    assert results.score_sign("recognised") == 1
    assert results.score_sign("precision-classifier") == 1
    assert results.score_sign("KID-classifier") == -1


def test_a_crossing_table_names_the_better_setting_at_each_cost():
    table = tables.crossing_table(make_group({1: SMALL, 2: large(-1, -0.5, 0.5)}), "KID", "solver_steps")
    assert table is not None
    ((pair, order, at, less, more),) = table.rows
    assert (pair, order, at) == ("D = 1 and D = 2", "changes\nclear on both sides", "16")
    assert less == "D = 1 by 0.5000\n[0.4752, 0.5248] at 8"
    assert more == "D = 2 by 0.5000\n[0.4752, 0.5248] at 32"
