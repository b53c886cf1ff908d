import json
import math

import pytest

from madformer_jax.config import schema
from madformer_jax.errors import ConfigError
from madformer_jax.modes import report
from madformer_jax.reports import comparisons, intervals, results
from madformer_jax.reports.axes import Axis
from tests.reports import made_up


def test_interval_of_a_mean_is_students():
    found = intervals.estimate([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)  # t(0.975, 2) of a printed table; the variance is 7
    assert found.mean == pytest.approx(3.0)
    assert (found.low, found.high) == pytest.approx((3.0 - half, 3.0 + half), rel=1e-6)


def test_the_interval_of_a_share_stays_within_0_and_1():
    def mean(score):
        points = [
            results.Point((), i, results.Budget("steps", 1), "", 0, {}, {score: results.Score(x)})
            for i, x in enumerate((0.8, 1.0))
        ]
        return results.score_estimate(points, score)

    assert mean("recall-classifier").high == 1.0 < mean("KID-classifier").high


@pytest.mark.parametrize(
    ("score", "sign"), [("attributes", 1), ("FD-attributes", -1), ("recall-attributes", 1), ("KID-classifier", -1)]
)
def test_score_sign(score, sign):
    assert results.score_sign(score) == sign


def test_dependent_fields_are_not_axes(tmp_path):
    """D decides the width; D and L together decide the training steps."""
    extra = {
        f"d{d}l{b}s{s}": {"model.width": 8 * d, "train.steps": 600 * d + b}
        for d in (1, 2) for b in (1, 4) for s in (0, 1)
    }  # fmt: skip
    group = made_up.load_group(tmp_path, depths=(1, 2), blocks=(1, 4), seeds=(0, 1), steps=(2, 4), extra=extra)
    depth, blocks = group.axes
    assert depth == Axis("model.diffusion_depth", (1, 2), ("model.width",)) and depth.label == "D"
    assert (blocks.label, blocks.dependent_fields) == ("L", ("train.steps",))
    assert [point.seed for point in group.points_at((2, 4), group.budgets[0])] == [0, 1]


def test_a_sampling_setting_is_an_axis(tmp_path):
    sampled = ({}, {"sample.spacing": "leading"})
    group = made_up.load_group(tmp_path, depths=(1, 2), seeds=(0,), steps=(2, 4), sampled=sampled)
    assert [axis.label for axis in group.axes] == ["D", "spacing"]
    assert group.settings == [(1, "leading"), (1, "trailing"), (2, "leading"), (2, "trailing")]
    assert "spacing" not in group.protocol["images"]


def test_sampling_settings_may_vary_together(tmp_path):
    sampled = [{"sample.solver": a, "sample.spacing": b} for a, b in (("ddim", "trailing"), ("dpmpp_2m", "leading"))]
    group = made_up.load_group(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), sampled=sampled)
    assert [(axis.field, axis.dependent_fields) for axis in group.axes[1:]] == [("sample.solver", ("sample.spacing",))]


def test_prompts_are_an_axis_with_dependent_fields(tmp_path):
    sampled = [{"sample.prompts": f"data:{split}"} for split in ("test", "composition")]
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), sampled=sampled)

    def name_prompts(run):
        for evaluation in run["evaluations"]:
            images, split = evaluation["protocol"]["images"], evaluation["overrides"]["sample.prompts"]
            images |= {"asked": split, "prompts": [f"one of {split}"], "tokens": split}

    made_up.change(tmp_path, name_prompts)
    (group,) = results.load_results(str(tmp_path)).groups
    assert [axis.label for axis in group.axes] == ["D", "prompts"]


def test_runs_on_different_noise_paths_share_a_column(tmp_path):
    extra = {f"d{d}l4s0": {"diffusion.path": path} for d, path in ((1, "ddpm"), (2, "flow"))}
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), extra=extra)

    def name_path(run):
        if run["overrides"]["diffusion.path"] == "flow":
            run["evaluations"][0]["protocol"]["images"]["diffusion"] = {"path": "flow"}

    made_up.change(tmp_path, name_path)
    (group,) = results.load_results(str(tmp_path)).groups
    (axis,) = group.axes
    assert {axis.field, *axis.dependent_fields} == {"model.diffusion_depth", "diffusion.path"}


def test_seconds_of_one_seed_apply_to_all(tmp_path):
    group = made_up.load_group(tmp_path, depths=(2,), seeds=(0, 1), steps=(4,))
    assert [point.cost["seconds"] for point in group.points] == pytest.approx([0.002 + 4 * 0.003] * 2)


def test_a_score_that_is_not_finite_counts_as_not_computed(tmp_path):
    name, *_ = made_up.write(tmp_path, depths=(1, 8), steps=(4,))
    nan = {"KID-classifier": {"value": math.nan}}
    made_up.change(tmp_path, lambda run: run["name"] == name and run["evaluations"][0]["scores"].update(nan))
    report.run(schema.base(), str(tmp_path))
    assert (tmp_path / "report/index.html").exists()
    (group,) = results.load_results(str(tmp_path)).groups
    assert sum("KID-classifier" in point.scores for point in group.points) == len(group.points) - 1


def test_tables_have_the_largest_budget_with_scores(tmp_path):
    def diverge(run):  # at the larger budget
        for score in run["evaluations"][1]["scores"].values():
            score["value"] = math.nan

    made_up.write(tmp_path, depths=(1, 8), blocks=(1, 4), seeds=(0, 1), steps=(2, 4))
    made_up.change(tmp_path, diverge)
    report.run(schema.base(), str(tmp_path))
    text = (tmp_path / "report/tables.md").read_text()
    assert "### D, at 2 steps" in text and "### D, at 4 steps" not in text


def test_missing_runs_are_listed(tmp_path):
    planned = [{"name": "later", "overrides": {"model.diffusion_depth": 4, "seed": 0}}]
    made_up.write(tmp_path, depths=(1,), seeds=(0,), steps=(2,), planned=planned)
    (tmp_path / "runs" / "begun").mkdir()
    found = results.load_results(str(tmp_path))
    assert [run["name"] for run in found.missing] == ["later"]
    assert found.groups[0].axes[0].values == (1,)  # an axis, although only one value has results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": {"n": 100}}, "do not share a column: n 500 against 100"),
        ({"protocol": {"reference": "another"}}, "reference 'rrrr"),
        ({"protocol": {"network": {"name": "classifier", "weights": "v"}}}, "network.weights"),
        ({"protocol": {"images": {"weights": "raw"}}}, "images.weights 'ema' against 'raw'"),
    ],
)
def test_scores_of_different_protocols_are_refused(tmp_path, change, message):
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), extra={"d2l4s0": change})
    with pytest.raises(ConfigError, match="run d2l4s0") as error:
        results.load_results(str(tmp_path))
    assert message in str(error.value)


def test_other_image_sizes_are_a_separate_group(tmp_path):
    small = {"data.image_size": 16, "protocol": {"reference": "s" * 12, "image": {"size": 16}}}
    made_up.write(tmp_path, depths=(1, 2), seeds=(0, 1), steps=(2,), extra={"d1l4s1": small, "d2l4s1": small})
    found = results.load_results(str(tmp_path))
    assert [group.name for group in found.groups] == ["image size = 16", "image size = 256"]
    assert [axis.label for axis in found.groups[0].axes] == ["D"]


@pytest.mark.parametrize("field", ["optimizer.learning_rate", "evaluate.held_out_n", "data.flip"])
def test_runs_that_differ_in_other_fields_are_refused(tmp_path, field):
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,))
    made_up.change(tmp_path, lambda run: run["config"].update({field: float(run["name"][1])}))
    with pytest.raises(ConfigError, match=f"d1l4s0 and d2l4s0 differ in {field}"):
        results.load_results(str(tmp_path))


def test_held_out_losses_of_different_numbers_of_images_are_refused(tmp_path):
    made_up.write(tmp_path, depths=(1, 2, 4), seeds=(0,), steps=(2,))
    images = {"d1l4s0": 256, "d2l4s0": 1000}  # a result of an earlier version does not say it
    made_up.change(tmp_path, lambda run: run["training"].update(held_out_images=images.get(run["name"])))
    with pytest.raises(ConfigError, match="d1l4s0 and d2l4s0 are of 256 and of 1000 images"):
        results.load_results(str(tmp_path))


def test_copied_runs_of_another_sweep_count_once_they_have_the_evaluations_of_the_plan(tmp_path):
    made_up.write(tmp_path, depths=(1, 2, 4), seeds=(0,), steps=(2,))
    path = tmp_path / "sweep.json"
    plan = json.loads(path.read_text())
    plan["runs"] = [run for run in plan["runs"] if run["name"] != "d4l4s0"]
    plan["evaluations"] = [{"overrides": {}, "budget": {"kind": "steps", "asked": 2}}]

    def load():
        path.write_text(json.dumps(plan))
        found = results.load_results(str(tmp_path))
        return [run["name"] for run in found.runs], [run["name"] for run in found.missing]

    made_up.change(tmp_path, lambda run: run["name"] != "d1l4s0" and run.update(sweep="ablations"))
    assert load() == (["d1l4s0", "d2l4s0"], [])
    plan["evaluations"][0]["budget"]["asked"] = 4
    assert load() == (["d1l4s0"], ["d2l4s0"])


def test_missing_and_damaged_results_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="holds no runs"):
        results.load_results(str(tmp_path))
    made_up.write(tmp_path, depths=(1,), seeds=(0,), steps=(2,))
    path = tmp_path / "runs" / "d1l4s0" / "result.json"
    result = json.loads(path.read_text())
    evaluation = {name: x for name, x in result["evaluations"][0].items() if name != "protocol"}
    for content, message in (
        ({}, "d1l4s0/result.json is damaged: it has no field 'name'"),
        ([result], "d1l4s0/result.json is damaged: it has no JSON object"),
        (result | {"evaluations": [evaluation]}, "result.json is damaged: evaluation 0 has no field 'protocol'"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            results.load_results(str(tmp_path))
    path.write_text(json.dumps(result))
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ConfigError, match="sweep.json is damaged: it has no JSON object"):
        results.load_results(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "base", "other", "label"),
    [
        ("model.diffusion_depth", 2, 1, "D = 1"),
        ("train.context_noise", 100, 0, "context noise = 0"),
        ("sample.guidance", 2.0, 1.0, "guidance = 1.0"),
        ("model.ar_condition", True, False, "no AR condition"),
        ("model.unet_context", False, True, "unet context"),
    ],
)
def test_only_booleans_are_labeled_as_switches(field, base, other, label):
    """The numbers 0 and 1 equal False and True, but are not switches."""
    axes = (Axis("model.width", (16, 24)), Axis(field, (base, other)))
    settings = [(16, base), (16, base), (24, base), (16, other)]  # a base and its ablations
    points = [results.Point(s, 0, results.Budget("steps", 1), "run", 0, {}, {}) for s in settings]
    group = results.ProtocolGroup("", axes, tuple(points), {})
    assert group.label((16, other)) == label


def test_of_equally_frequent_values_that_of_the_base_config_names_the_base():
    axes = (Axis("diffusion.path", ("ddpm", "flow")), Axis("model.prediction_type", ("eps", "v", "x0")))
    settings = [("ddpm", "v"), ("ddpm", "x0")]  # not a grid
    points = tuple(results.Point(s, 0, results.Budget("steps", 1), "run", 0, {}, {}) for s in settings)
    group = results.ProtocolGroup("", axes, points, {})
    known = group._replace(base_values={"model.prediction_type": "x0"})
    assert [g.label(("ddpm", "x0")) for g in (group, known)] == ["prediction type = x0", "base"]
    assert comparisons.contrasts(known) == [(("ddpm", "v"), ("ddpm", "x0"))]


def test_a_single_seed_has_no_interval():
    assert intervals.estimate([2.0]) == intervals.Estimate((2.0,), 2.0, None, None)
