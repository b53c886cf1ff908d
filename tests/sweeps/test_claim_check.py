"""Checks of a protocol against its sweep and against an earlier protocol of the folder."""

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage
from madformer_jax.sweeps import budget, claim_check, sweep_file, sweep_folder
from madformer_jax.sweeps.protocol import AFTER, Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, grid
from tests import tiny


def contrast(field, a, b, primary, sides=None):
    """Returns a sweep of two values of a field with one claim, by default that a is better than b."""
    better, worse = sides or ({field: a}, {field: b})
    claim = Claim("x", better, worse, None if "loss" in primary or "bits" in primary else ("steps", 4))
    return Sweep("", grid({field: (a, b)}), {"steps": (4,)}, protocol=Protocol(primary, "FD", [claim], ""))


def get_base():
    c = tiny.get_config("plain")
    c.model.blocks = 4  # own context has no effect with one
    return c


def check(definition):
    c = get_base()
    claim_check.check(definition, c, sweep_file.expand_runs(definition, c))


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (("model.width", 16, 24, "KID", ({"model.width": 24}, {"model.width": 32})), "'x': no run of the sweep has"),
        (("model.width", 24, 32, "KID", ({"model.width": 24}, {})), "'x': no run of the sweep has"),
        (("model.width", 16, 24, "KID", ({"model.width": 16}, {})), "both sides are the same setting"),
        (("data.image_size", 16, 32, "KID"), "its sides differ in data.image_size"),
        (("codec.patch", 4, 8, "KID"), "its sides differ in codec.patch"),
        (("model.blocks", 1, 4, "seam"), "depends on the blocks: use seam_difference"),
        (("loss.hidden", 0.0, 0.1, "KDI"), "the primary endpoint 'KDI' is unknown"),
        (("loss.hidden", 0.0, 0.1, "bits_per_dimension"), "not measured: set config.evaluate.held_out_n"),
        (("loss.hidden", 0.0, 0.1, "held_out_loss_image"), "not measured: set config.train.validate_every"),
        (("train.own_context", 0.0, 0.5, "loss_image"), "another target for another train.own_context"),
    ],
)
def test_a_claim_that_no_report_could_answer_is_an_error(definition, message):
    with pytest.raises(ConfigError, match=message):
        check(contrast(*definition))


def test_a_budget_below_one_solver_step_is_an_error():
    definition = contrast("loss.hidden", 0.0, 0.1, "KID")
    one_step = budget.sampling_cost(get_base(), "passes", 1)
    claims = [claim._replace(at=("passes", 0.9 * one_step)) for claim in definition.protocol.claims]
    definition = definition._replace(
        sample_budgets={"passes": (0.9 * one_step,)}, protocol=definition.protocol._replace(claims=claims)
    )
    with pytest.raises(ConfigError, match="no samples with .* cost at most .* passes"):
        check(definition)


def test_a_side_may_leave_out_or_spell_out_the_base():
    base = get_base()
    for sides in (({"model.width": 24}, {}), ({"model.blocks": base.model.blocks, "model.width": 24}, {})):
        check(contrast("model.width", base.model.width, 24, "seam", sides))


def test_a_protocol_does_not_change_after_a_result(tmp_path):
    """Texts may change. A protocol that says that it came after the results may differ."""
    first = contrast("model.width", 16, 24, "KID")
    (claim,) = first.protocol.claims
    runs = sweep_file.expand_runs(first, tiny.get_config("plain"))

    def check_unchanged(**changes):
        definition = first._replace(protocol=first.protocol._replace(**changes))
        job = sweep_folder.Job("widths", "", definition, runs, sweep_file.expand_evaluations(definition), str(tmp_path))
        claim_check.check_unchanged(job)
        storage.write_json(tmp_path / "sweep.json", sweep_folder.plan_json(job))

    opposite = claim._replace(better=claim.worse, worse=claim.better)
    for claims in ([claim], [opposite], [claim]):
        check_unchanged(claims=claims)
    storage.write_json(tmp_path / "runs" / runs[0].name / "result.json", {})
    check_unchanged(claims=[claim._replace(text="a wide model is better")])
    for changes in ({"claims": [opposite]}, {"claims": [claim, opposite]}, {"primary": "FD"}, {"margin": 0.1}):
        with pytest.raises(ConfigError, match="protocol differs from that of .*sweep.json, and 1 runs have results"):
            check_unchanged(**changes)
    check_unchanged(claims=[opposite], written=AFTER)
    with pytest.raises(ConfigError, match="protocol differs"):
        check_unchanged(claims=[opposite])  # now as if it were older than the results
