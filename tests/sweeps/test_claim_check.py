"""Checks of a protocol against its sweep and against an earlier protocol of the folder."""

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage
from madformer_jax.sweeps import budget, claim_check, sweep_file, sweep_folder
from madformer_jax.sweeps.protocol import AFTER, Claim, Protocol, resolve_side
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
    claim_check.check(definition, c)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (("model.width", 16, 24, "KID", ({"model.width": 24}, {"model.width": 32})), "'x': no run of the sweep has"),
        (("model.width", 24, 32, "KID", ({"model.width": 24}, {})), "'x': no run of the sweep has"),
        (("model.width", 16, 24, "KID", ({"model.width": 16}, {})), "both sides are the same setting"),
        (("data.image_size", 16, 32, "KID"), "its sides differ in data.image_size"),
        (("codec.patch", 4, 8, "KID"), "its sides differ in codec.patch"),
        (("model.blocks", 1, 4, "seam"), "one block has no borders: use seam_difference"),
        (("model.blocks", 4, 16, "seam"), "depends on the blocks: use seam_difference"),
        (("loss.hidden", 0.0, 0.1, "KDI"), "the primary endpoint 'KDI' is unknown"),
        (("loss.hidden", 0.0, 0.1, "bits_per_dimension"), "not measured: set config.evaluate.held_out_n"),
        (("loss.hidden", 0.0, 0.1, "held_out_loss_image"), "not measured: set config.train.validate_every"),
        (("loss.hidden", 0.0, 0.1, "held_out_loss_imgae"), "the primary endpoint 'held_out_loss_imgae' is unknown"),
        (("loss.image", 0.5, 1.0, "loss_clean"), "not measured: config.loss.clean is 0"),
        (("loss.hidden", 0.0, 0.1, "FID"), "not measured: set config.evaluate.network=inception, or use FD"),
        (("loss.hidden", 0.0, 0.1, "memorized"), "not measured: set config.evaluate.training=True"),
        (("train.own_context", 0.0, 0.5, "loss_image"), "another target for another train.own_context"),
    ],
)
def test_a_claim_that_no_report_could_answer_is_an_error(definition, message):
    with pytest.raises(ConfigError, match=message):
        check(contrast(*definition))


@pytest.mark.parametrize(
    ("budgets", "at", "message"),
    [
        ({"passes": (1.5,)}, ("passes", 1.5), "no samples of one side cost at most 1.5 passes"),
        ({"steps": (8, 16)}, ("steps", 4), "The least of the sweep's sample_budgets is 8 steps"),
        ({"steps": (4,)}, ("nfe", 0.5), "no samples of one side cost at most 0.5 nfe"),
        ({"steps": (4,)}, ("seconds", 1), "the sweep measures no seconds"),
        ({"steps": (4,)}, ("steps",), "must be a kind and a number"),
        ({"steps": (4,)}, ("steps", "4"), "must be a kind and a number"),
    ],
)
def test_a_claim_needs_samples_within_its_budget(budgets, at, message):
    definition = contrast("loss.hidden", 0.0, 0.1, "KID")._replace(sample_budgets=budgets)
    claims = [claim._replace(at=at) for claim in definition.protocol.claims]
    with pytest.raises(ConfigError, match=message):
        check(definition._replace(protocol=definition.protocol._replace(claims=claims)))


def test_a_budget_counts_the_sampling_settings_of_the_side():
    """With guidance, a step costs two evaluations of the network."""
    definition = contrast("loss.hidden", 0.0, 0.1, "KID")
    one_step = budget.sampling_cost(get_base(), "nfe", 1)
    claims = [claim._replace(at=("nfe", 1.5 * one_step)) for claim in definition.protocol.claims]
    definition = definition._replace(
        sample_budgets={"steps": (1,)}, protocol=definition.protocol._replace(claims=claims)
    )
    check(definition)
    base = get_base()
    base.model.classes = 3
    with pytest.raises(ConfigError, match="no samples of one side cost"):
        claim_check.check(definition._replace(evaluations=[{"sample.guidance": 2.0}]), base)


def test_an_evaluation_of_a_field_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="guidence"):
        check(contrast("loss.hidden", 0.0, 0.1, "KID")._replace(evaluations=[{"sample.guidence": 2.0}]))


def test_the_base_is_no_setting_with_another_value_than_its_own():
    base = {"model.depth": 4, "model.width": 32, "train.steps": 600}
    runs = [{"model.depth": 8, "model.width": 32}, {"model.depth": 4, "model.width": 64}]
    assert resolve_side({}, runs, base) is None
    assert resolve_side({}, [*runs, {"model.depth": 4, "model.width": 32}], base) == {
        "model.depth": 4,
        "model.width": 32,
    }
    # The steps of this setting follow from its width.
    equal_flops = [{"model.width": 64, "model.depth": n, "train.steps": k} for n, k in ((4, 300), (8, 200))]
    assert resolve_side({"model.width": 64}, equal_flops, base) == equal_flops[0]


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
