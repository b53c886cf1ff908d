"""The answers to a protocol, from made-up results."""

import json

import pytest

from madformer_jax.modes import report
from madformer_jax.reports import answers, results
from madformer_jax.sweeps.protocol import Claim, Protocol
from tests.reports import made_up

SMALL, LARGE = {"model.diffusion_depth": 1}, {"model.diffusion_depth": 8}
CLAIMS = [
    Claim("a small D wins at few steps", SMALL, LARGE, ("steps", 2)),
    Claim("a small D wins at many steps", SMALL, LARGE, ("steps", 64)),
    Claim("D = 2 has results", {"model.diffusion_depth": 2}, LARGE, ("steps", 64)),
]


def load(folder, protocol, seeds=(0, 1, 2)):
    made_up.write(folder, depths=(1, 8), seeds=seeds, steps=(2, 64), scores=("KID-classifier",))
    path = folder / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": protocol.describe()}))
    return results.load_results(str(folder))


def test_claims_are_shown_refuted_or_open(tmp_path):
    found = answers.answers(load(tmp_path, Protocol("KID", "FD", CLAIMS, "never")))
    assert [answer.verdict for answer in found] == ["shown", "refuted", "open"]
    assert found[0].steps == (2, 2)
    differences = [made_up.score(8, 2, seed) - made_up.score(1, 2, seed) for seed in (0, 1, 2)]
    assert found[0].improvement.mean == pytest.approx(sum(differences) / 3)
    assert found[2].sentence == "Open: D = 2 has results. There are no results for it."


def test_an_answer_says_that_seeds_do_not_count(tmp_path):
    load(tmp_path, Protocol("KID", "FD", CLAIMS[:1], "never"))
    path = tmp_path / "runs" / "d8l4s1" / "result.json"
    result = json.loads(path.read_text())
    for evaluation in result["evaluations"]:
        evaluation["scores"]["KID-classifier"]["value"] = float("nan")
    path.write_text(json.dumps(result))
    (found,) = answers.answers(results.load_results(str(tmp_path)))
    assert improvements(found) == expected((0, 2))
    assert " Only 2 of 3 seeds count: " in found.sentence


def improvements(answer):
    return [round(x, 12) for x in answer.improvement.values]


def expected(seeds):
    return [round(made_up.score(8, 2, seed) - made_up.score(1, 2, seed), 12) for seed in seeds]


@pytest.mark.parametrize("place", ["where", "both sides"])
def test_a_claim_is_answered_from_the_table_that_it_names(tmp_path, place):
    """The table of 16 px comes first."""
    small = {"data.image_size": 16, "protocol": {"reference": "s" * 12}}
    extra = {f"d{depth}l4s{seed}": small for depth in (1, 8) for seed in (2, 3)}
    made_up.write(tmp_path, depths=(1, 8), seeds=(0, 1, 2, 3), steps=(2,), extra=extra)
    size = {"data.image_size": 256}
    claim = Claim("x", SMALL | size, LARGE | size, ("steps", 2)) if place == "both sides" else None
    claim = claim or Claim("x", SMALL, LARGE, ("steps", 2), where=size)
    protocol = Protocol("KID", "FD", [claim], "never").describe()
    (found,) = answers.answers(results.load_results(str(tmp_path))._replace(protocol=protocol))
    assert improvements(found) == expected((0, 1))


def test_a_side_without_overrides_is_the_base_of_a_grid(tmp_path):
    """All runs set D, so that only the plan tells D of the base. It also holds former names of fields."""
    claims = [Claim("x", SMALL, {}, ("steps", 2)), Claim("y", {"model.predicts": "v"}, LARGE, ("steps", 2))]
    loaded = load(tmp_path, Protocol("KID", "FD", claims, "never"))
    assert answers.answers(loaded)[0].improvement is None
    base, other = answers.answers(loaded._replace(base={"model.diffusion_depth": 8}))
    assert improvements(base) == expected((0, 1, 2))
    assert other.improvement is None  # not the answer for the base


def test_fields_that_follow_from_an_axis_name_a_setting(tmp_path):
    extra = {f"d{depth}l4s{seed}": {"model.width": 8 * depth} for depth in (1, 8) for seed in (0, 1)}
    made_up.write(tmp_path, depths=(1, 8), seeds=(0, 1), steps=(2,), extra=extra)
    claim = Claim("x", {"model.width": 8}, {"model.width": 64}, ("steps", 2))
    protocol = Protocol("KID", "FD", [claim], "never").describe()
    (found,) = answers.answers(results.load_results(str(tmp_path))._replace(protocol=protocol))
    assert improvements(found) == expected((0, 1))


def test_claims_of_one_text_name_their_settings(tmp_path):
    claims = [Claim("a small D wins", {"model.diffusion_depth": depth}, LARGE) for depth in (1, 2)]
    found = answers.answers(load(tmp_path, Protocol("KID", "FD", claims, "never")))
    for answer, depth in zip(found, (1, 2), strict=True):
        assert f"a small D wins (model.diffusion_depth = {depth} against model.diffusion_depth = 8)." in answer.sentence


def test_more_claims_widen_every_interval(tmp_path):
    one, three = (
        answers.answers(load(tmp_path / str(n), Protocol("KID", "FD", CLAIMS[:n], "never")))[0].improvement
        for n in (1, 3)
    )
    assert one.mean == three.mean
    assert three.high > one.high


def test_an_improvement_below_the_margin_refutes(tmp_path):
    """The interval may include 0, but it must lie below the margin."""
    loaded = load(tmp_path, Protocol("loss_image", "KID", [Claim("D matters", SMALL, LARGE)], "never", margin=0.02))
    for run in loaded.runs:
        noise = 1e-3 * run["seed"] * (run["overrides"]["model.diffusion_depth"] - 1) / 7
        run["training"]["curve"] = [{"step": 600, "loss_image": 1.0 + noise}]
    (found,) = answers.answers(loaded)
    assert found.improvement.low < 0 < found.improvement.high < 0.02
    assert found.verdict == "refuted"
    assert found.sentence.endswith(" The interval lies below the smallest improvement that counts.")
    (open_,) = answers.answers(loaded._replace(protocol=loaded.protocol | {"margin": 0.0}))
    assert open_.verdict == "open"


def test_a_shown_improvement_below_the_margin_is_marked(tmp_path):
    small, none = (
        answers.answers(load(tmp_path / str(margin), Protocol("KID", "FD", CLAIMS[:1], "never", margin)))[0]
        for margin in (100.0, 0.0)
    )
    assert small.verdict == none.verdict == "shown"
    assert small.sentence == f"{none.sentence} This is below the smallest improvement that counts."


def test_one_seed_leaves_a_claim_open(tmp_path):
    (found, *_) = answers.answers(load(tmp_path, Protocol("KID", "FD", CLAIMS[:1], "never"), seeds=(0,)))
    assert found.verdict == "open"
    assert "(no interval: one seed)" in found.sentence


def test_the_report_begins_with_the_answer(tmp_path):
    load(tmp_path, Protocol("KID", "FD", CLAIMS[:2], "both intervals include 0"))
    report.run(None, str(tmp_path))
    lines = (tmp_path / "report" / "tables.md").read_text().splitlines()
    assert max(len(line) for line in lines if not line.startswith(("|", "#", "python -m "))) <= 100
    lines = [line for line in lines if not line.startswith("  ")]  # of a wrapped list item only the first
    shown = next(i for i, line in enumerate(lines) if line.startswith("- Shown: a small D wins at few steps"))
    assert lines[shown + 1].startswith("- Refuted: a small D wins at many steps")
    assert shown < 10 and "- refuted if: both intervals include 0" in lines
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.index("Shown: a small D") < page.index("<svg") < page.index("<table")
