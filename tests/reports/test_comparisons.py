import pytest

from madformer_jax.reports import comparisons, intervals, results, tables
from madformer_jax.reports.axes import Axis
from madformer_jax.reports.results import Budget, Point, ProtocolGroup, Score
from tests.reports import made_up


def make_group(curves):
    """Returns a group from {D: {seed: {steps: score}}}. The NFE are D times the steps."""
    points = [
        Point(
            (d,), seed, Budget("steps", steps), f"{d}-{seed}", 0,
            {"solver_steps": steps, "nfe": d * steps}, {"KID": Score(value)},
        )
        for d, seeds in curves.items() for seed, values in seeds.items() for steps, value in values.items()
    ]  # fmt: skip
    return ProtocolGroup("", (Axis("model.diffusion_depth", tuple(curves)),), tuple(points), {})


SMALL = {seed: {2: 5 + 0.1 * seed, 8: 4 + 0.1 * seed, 32: 3 + 0.1 * seed} for seed in range(3)}
STEPS = [Budget("steps", n) for n in (2, 8, 32)]


def large(*by):
    """Returns SMALL improved by `by` at each number of steps, with a small variation between seeds."""
    return {
        seed: {steps: value - b + 0.01 * (seed - 1) for (steps, value), b in zip(values.items(), by)}
        for seed, values in SMALL.items()
    }


def test_a_setting_stops_at_its_best_step_count_within_the_budget():
    """D = 1 gets worse after 8 steps. It is not forced to spend a budget of 32 NFE."""
    worse_later = {seed: {2: 5.0, 8: 4.0 + 0.1 * seed, 32: 9.0} for seed in range(3)}
    group = make_group({1: worse_later, 4: SMALL})
    best = comparisons.best_within(group, (1,), "KID", Budget("nfe", 32))
    assert best.steps == 8
    assert best.values == {0: 4.0, 1: 4.1, 2: 4.2}
    assert comparisons.best_within(group, (4,), "KID", Budget("nfe", 32)).steps == 8  # 32 steps cost 128
    assert comparisons.best_within(group, (4,), "KID", Budget("nfe", 7)) is None


def test_differences_are_paired_by_seed_and_corrected_for_their_number():
    """Each seed shifts both curves by ten times the difference. Unpaired intervals would include 0."""
    shifted = {s: {n: v + s for n, v in values.items()} for s, values in SMALL.items()}
    other = {s: {n: v + s for n, v in values.items()} for s, values in large(-0.1, 0.05, 0.1).items()}
    found = comparisons.differences_at_best_steps(make_group({1: shifted, 2: other}), "KID", STEPS)
    assert [[d.estimate.sign for d in found[budget]] for budget in STEPS] == [[1], [-1], [-1]]
    first = found[STEPS[0]][0].estimate
    assert first.high - first.mean > 1.2 * (intervals.estimate(first.values).high - first.mean)


def test_a_crossing_outside_of_the_bands_is_shown():
    (found,) = comparisons.find_crossings(make_group({1: SMALL, 2: large(-1, -0.5, 0.5)}), "KID", STEPS)
    assert (found.verdict, found.clear) == ("shown", (3, 3))
    assert (found.before[0].amount, found.after[0].amount) == (2, 32)
    assert found.before[1].estimate.mean == pytest.approx(-1.0)  # the first setting minus the second


@pytest.mark.parametrize(
    ("by", "seeds", "verdict", "clear"),
    [
        ((-1, 0.005, 0.002), 3, "means only", 1),  # the means cross within their bands
        ((-1, 0, 1), 1, "means only", 0),  # one seed is never clear
        ((1, 0.5, 0.1), 3, "none", 3),
    ],
)
def test_other_curves_show_no_crossing(by, seeds, verdict, clear):
    curves = ({seed: curve[seed] for seed in range(seeds)} for curve in (SMALL, large(*by)))
    (found,) = comparisons.find_crossings(make_group(dict(zip((1, 2), curves))), "KID", STEPS)
    assert (found.verdict, found.clear) == (verdict, (clear, 3))


def test_a_crossing_table_names_the_better_setting_at_each_budget():
    (table,) = tables.crossing_tables(make_group({1: SMALL, 2: large(-1, -0.5, 0.5)}), "KID")
    ((pair, order, less, more),) = table.rows
    assert (pair, order) == ("D = 1 and D = 2", "changes, clear on both sides\nclear at 3 of 3")
    assert less.startswith("D = 1 by 1\n[") and less.endswith("at 2 steps")
    assert more.startswith("D = 2 by 0.500\n[") and more.endswith("at 32 steps")


def test_ablations_are_compared_with_the_base_and_a_grid_with_its_first_value():
    axes = (Axis("model.clean_stream", (False, True)), Axis("model.blocks", (1, 4)))

    def group(*settings):
        points = [Point(s, 0, Budget("steps", 1), "run", 0, {}, {}) for s in settings]
        return ProtocolGroup("", axes, tuple(points), {})

    base = (True, 4)
    assert comparisons.contrasts(group((False, 4), base, (True, 1))) == [((False, 4), base), ((True, 1), base)]
    grid = group((False, 1), (False, 4), (True, 1), (True, 4))
    assert comparisons.contrasts(grid) == [
        ((True, 1), (False, 1)), ((True, 4), (False, 4)), ((False, 4), (False, 1)), ((True, 4), (True, 1)),
    ]  # fmt: skip


def test_without_a_setting_of_the_most_frequent_values_the_most_central_one_is_the_base():
    arms = [
        ("eps", "output", "ddpm"),
        ("v", "v", "ddpm"),
        ("x0", "output", "ddpm"),
        ("x0", "v", "ddpm"),
        ("v", "output", "flow"),
    ]
    axes = tuple(Axis(name, ()) for name in ("model.prediction_type", "loss.weighting", "diffusion.path"))
    points = tuple(Point(arm, 0, Budget("steps", 1), "run", 0, {}, {}) for arm in arms)
    found = comparisons.contrasts(ProtocolGroup("", axes, points, {}))
    assert found == [(arm, arms[2]) for arm in arms if arm != arms[2]]


def test_a_setting_that_is_not_comparable_with_the_base_is_compared_with_the_nearest_that_is():
    axes = (Axis("train.own_context", (0.0, 0.5)), Axis("model.blocks", (4, 16)), Axis("train.context_noise", (0, 100)))
    settings = [(0.0, 4, 0), (0.5, 4, 0), (0.0, 4, 100), (0.5, 16, 0), (0.0, 16, 100), (0.0, 16, 0)]
    real = {4: intervals.estimate([1.8]), 16: intervals.estimate([1.4])}
    points = tuple(
        Point(s, 0, Budget("steps", 1), "run", 0, {}, {"seam": Score(2.0, real=real[s[1]]), "KID": Score(1.0)})
        for s in settings
    )
    group = ProtocolGroup("", axes, points, {})
    base, base_16 = settings[0], settings[-1]
    assert comparisons.contrasts(group, "KID") == [(s, base) for s in settings[1:]]
    assert comparisons.contrasts(group, "seam") == [
        (settings[1], base), (settings[2], base), (settings[3], base_16), (settings[4], base_16),
    ]  # fmt: skip


def test_losses_of_other_targets_are_not_compared():
    blocks, depth = Axis("model.blocks", (1, 4)), Axis("model.diffusion_depth", (1, 2))
    group = ProtocolGroup("", (blocks, depth), (), {})
    assert comparisons.comparable_losses(group, ((1, 1), (1, 2)), "loss_image")
    assert not comparisons.comparable_losses(group, ((1, 1), (4, 1)), "held_out_loss_image")
    assert comparisons.comparable_losses(group, ((1, 1), (4, 1)), "bits_per_dimension")


@pytest.mark.parametrize("field", ["train.own_context", "train.elastic_depth"])
def test_losses_of_training_on_other_inputs_are_not_compared(field):
    """Held-out losses are those of true blocks and of the model's own D."""
    group = ProtocolGroup("", (Axis(field, (0, 1)),), (), {})
    assert not comparisons.comparable_losses(group, ((0,), (1,)), "loss_image")
    assert comparisons.comparable_losses(group, ((0,), (1,)), "held_out_loss_image")


def test_a_loss_belongs_to_the_first_evaluation_of_a_run(tmp_path):
    """Otherwise settings of sampling would differ by exactly 0."""
    made_up.write(tmp_path, depths=(1, 2), steps=(2,), sampled=({}, {"sample.spacing": "leading"}))
    made_up.change(tmp_path, lambda run: run["training"].update(held_out={"loss_image": run["seed"]}))
    loaded = results.load_results(str(tmp_path))
    (found,) = comparisons.loss_differences(loaded, loaded.groups[0], "held_out_loss_image")
    assert (found.setting, found.baseline) == ((2, "trailing"), (1, "trailing"))


def test_losses_are_means_over_the_last_quarter_of_the_steps():
    curve = [{"step": step, "loss_image": step / 100} for step in (200, 400, 600, 700, 800)]
    run = {"training": {"curve": curve, "held_out": {"loss_image": 0.5}}}
    assert comparisons.training_losses(run) == {"loss_image": 7.5, "held_out_loss_image": 0.5}
    scores = {"held_out": {"held_out_loss_image": {"value": 0.4}, "bits_per_dimension": {"value": 3.0}}}
    assert comparisons.training_losses(run | scores) == {
        "loss_image": 7.5, "held_out_loss_image": 0.4, "bits_per_dimension": 3.0
    }  # fmt: skip
    curve[3]["loss_q1"], curve[1]["loss_q4"] = 3.0, 4.0  # a window may lack a quarter of the timesteps
    assert comparisons.training_losses(run) == {"loss_image": 7.5, "loss_q1": 3.0, "held_out_loss_image": 0.5}


def with_losses(axes, losses):
    """Returns results and a group from {setting: {seed: losses}}."""
    runs, points = [], []
    for setting, seeds in losses.items():
        for seed, values in seeds.items():
            name = f"{setting}-{seed}"
            runs.append(
                {"name": name, "training": {"curve": [{"step": 1, **values}]}, "evaluations": [{"overrides": {}}]}
            )
            points.append(Point(setting, seed, Budget("steps", 1), name, 0, {}, {}))
    group = ProtocolGroup("", axes, tuple(points), {})
    return results.Results("x", "", "", tuple(runs), (group,), (), None), group


def test_quarters_are_compared_over_the_seeds_that_drew_them_all():
    quarters = {f"loss_q{i}": 0.1 * i for i in (1, 2, 3, 4)}
    seeds = {seed: {name: x + 0.01 * seed for name, x in quarters.items()} for seed in (0, 1, 2)}
    less = {seed: {name: x + 0.02 * seed for name, x in values.items()} for seed, values in seeds.items()}
    del less[0]["loss_q4"]
    axes = (Axis("model.diffusion_depth", (1, 2)),)
    (row,) = comparisons.quarter_loss_differences(*with_losses(axes, {(1,): seeds, (2,): less}))
    assert all(d.estimate.values == pytest.approx((0.02, 0.04)) for d in row)


def test_a_table_of_losses_has_every_difference_and_calls_only_baselines_so():
    axes = (Axis("model.depth", (2, 4)), Axis("model.diffusion_depth", (1, 2)))
    grid = {(n, d): {seed: {"loss_image": n + d + 0.1 * seed} for seed in (0, 1)} for n in (2, 4) for d in (1, 2)}
    (table,) = tables.loss_tables(*with_losses(axes, grid))
    last = [(row[0], row[-1].note) for row in table.rows if row[0] == "N = 4, D = 2"]
    assert last == [("N = 4, D = 2", "+49.4% against N = 2, D = 2"), ("N = 4, D = 2", "+19.8% against N = 4, D = 1")]
    axes = (Axis("model.depth", (2, 4)), Axis("loss.weighting", ("output", "v")))
    ablations = {s: {0: {"loss_image": 1.0}} for s in ((2, "output"), (4, "output"), (2, "v"))}
    (table,) = tables.loss_tables(*with_losses(axes, ablations))
    assert [row[-1] if isinstance(row[-1], str) else row[-1].note for row in table.rows] == ["baseline", "+0.0%", ""]
