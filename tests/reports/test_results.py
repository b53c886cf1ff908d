import json
import math

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.reports import results
from madformer_jax.reports.axes import Axis
from tests.reports import made_up


def test_interval_of_a_mean_is_students():
    found = results.estimate([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)  # t(0.975, 2) of a printed table; the variance is 7
    assert found.mean == pytest.approx(3.0)
    assert (found.low, found.high) == pytest.approx((3.0 - half, 3.0 + half), rel=1e-6)


def test_a_single_seed_has_no_interval():
    assert results.estimate([2.0]) == results.Estimate((2.0,), 2.0, None, None)


@pytest.mark.parametrize(("score", "sign"), [("attributes", 1), ("FD-attributes", -1), ("recall-attributes", 1)])
def test_it_is_known_which_scores_are_the_better_ones(score, sign):
    assert results.score_sign(score) == sign


def test_axes_are_what_varies_and_what_changes_with_it_follows(tmp_path):
    """A width that D decides, steps that D and L decide together."""
    extra = {
        f"d{d}l{b}s{s}": {"model.width": 8 * d, "train.steps": 600 * d + b}
        for d in (1, 2) for b in (1, 4) for s in (0, 1)
    }  # fmt: skip
    made_up.write(tmp_path, depths=(1, 2), blocks=(1, 4), seeds=(0, 1), steps=(2, 4), extra=extra)
    (part,) = results.load_results(str(tmp_path)).parts
    depth, blocks = part.axes
    assert (depth.field, depth.label, depth.values, depth.follows) == (
        "model.diffusion_depth",
        "D",
        (1, 2),
        ("model.width",),
    )
    assert (blocks.label, blocks.follows) == ("L", ("train.steps",))
    assert [point.seed for point in part.at((2, 4), part.budgets[0])] == [0, 1]


def test_a_setting_of_sampling_is_an_axis_too(tmp_path):
    sampled = ({}, {"sample.spacing": "leading"})
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2, 4), sampled=sampled)
    (part,) = results.load_results(str(tmp_path)).parts
    assert [axis.label for axis in part.axes] == ["D", "spacing"]
    assert part.settings == [(1, "leading"), (1, "trailing"), (2, "leading"), (2, "trailing")]
    assert "spacing" not in part.protocol["images"]


def test_settings_of_sampling_may_vary_together(tmp_path):
    sampled = [{"sample.solver": a, "sample.spacing": b} for a, b in (("ddim", "trailing"), ("dpmpp_2m", "leading"))]
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), sampled=sampled)
    (part,) = results.load_results(str(tmp_path)).parts
    assert [(axis.field, axis.follows) for axis in part.axes[1:]] == [("sample.solver", ("sample.spacing",))]


def test_prompts_are_an_axis_with_all_that_follows_from_them(tmp_path):
    sampled = [{"sample.prompts": f"data:{split}"} for split in ("test", "composition")]
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), sampled=sampled)
    for path in tmp_path.glob("runs/*/result.json"):
        run = json.loads(path.read_text())
        for evaluation in run["evaluations"]:
            images = evaluation["protocol"]["images"]
            images |= {
                "asked": images["prompts"],
                "prompts": [f"one of {images['prompts']}"],
                "tokens": images["prompts"],
            }
        path.write_text(json.dumps(run))
    (part,) = results.load_results(str(tmp_path)).parts
    assert [axis.label for axis in part.axes] == ["D", "prompts"]


def test_seconds_of_one_seed_are_those_of_all(tmp_path):
    made_up.write(tmp_path, depths=(2,), seeds=(0, 1), steps=(4,))
    (part,) = results.load_results(str(tmp_path)).parts
    assert [point.cost["seconds"] for point in part.points] == pytest.approx([0.002 + 4 * 0.003] * 2)


def test_what_is_missing_is_told(tmp_path):
    planned = [{"name": "later", "overrides": {"model.diffusion_depth": 4, "seed": 0}}]
    made_up.write(tmp_path, depths=(1,), seeds=(0,), steps=(2,), planned=planned)
    (tmp_path / "runs" / "begun").mkdir()
    found = results.load_results(str(tmp_path))
    assert [run["name"] for run in found.missing] == ["later"]
    assert found.parts[0].axes[0].values == (1,)  # an axis, although one value alone is there


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protocol": {"n": 100}}, "do not share a column: n 500 against 100"),
        ({"protocol": {"reference": "another"}}, "reference 'rrrr"),
        ({"protocol": {"network": {"name": "classifier", "weights": "v"}}}, "network.weights"),
        ({"protocol": {"images": {"weights": "raw"}}}, "images.weights 'ema' against 'raw'"),
    ],
)
def test_scores_of_different_protocols_are_refused(tmp_path, change, told):
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,), extra={"d2l4s0": change})
    with pytest.raises(ConfigError, match="run d2l4s0") as error:
        results.load_results(str(tmp_path))
    assert told in str(error.value)


def test_other_pictures_are_a_part_of_their_own(tmp_path):
    small = {"data.image_size": 16, "protocol": {"reference": "s" * 12, "image": {"size": 16}}}
    made_up.write(tmp_path, depths=(1, 2), seeds=(0, 1), steps=(2,), extra={"d1l4s1": small, "d2l4s1": small})
    found = results.load_results(str(tmp_path))
    assert [part.name for part in found.parts] == ["image size = 16", "image size = 256"]
    assert [axis.label for axis in found.parts[0].axes] == ["D"]


def test_runs_that_differ_in_what_is_not_swept_are_refused(tmp_path):
    made_up.write(tmp_path, depths=(1, 2), seeds=(0,), steps=(2,))
    path = tmp_path / "runs" / "d2l4s0" / "result.json"
    run = json.loads(path.read_text())
    run["config"]["optimizer.learning_rate"] = 1.0
    path.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="d1l4s0 and d2l4s0 differ in optimizer.learning_rate"):
        results.load_results(str(tmp_path))


def test_a_folder_without_results_and_a_damaged_one_are_told(tmp_path):
    with pytest.raises(ConfigError, match="holds no runs"):
        results.load_results(str(tmp_path))
    made_up.write(tmp_path, depths=(1,), seeds=(0,), steps=(2,))
    (tmp_path / "runs" / "d1l4s0" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="d1l4s0/result.json is damaged: it has no name"):
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
def test_only_a_switch_is_named_as_one(field, base, other, label):
    """0 and 1 equal False and True, and are numbers."""
    axes = (Axis("model.width", (16, 24)), Axis(field, (base, other)))
    settings = [(16, base), (16, base), (24, base), (16, other)]  # a base and its ablations, no grid
    points = [results.Point(s, 0, results.Budget("steps", 1), "run", 0, {}, {}) for s in settings]
    part = results.ProtocolGroup("", axes, tuple(points), {})
    assert part.label((16, other)) == label
