"""What exists for which terms and switches; that the model computes it is in test_madformer, that it costs it in test_flops."""

import itertools

from madformer_jax.config import schema
from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.models import madformer
from madformer_jax.models.plan import AblationSwitches, TrainingPlan, ablation_switches, training_plan

EVERYTHING = AblationSwitches(
    4, text=True, clean_stream=True, ar_condition=True, hidden_from="condition", block_only=False
)
SWITCHES = [
    AblationSwitches(*values)
    for values in itertools.product((1, 4), *[(False, True)] * 3, ("condition", "noisy"), (False, True))
]
CASES = [
    (terms, s, training_plan(terms, s))
    for s in SWITCHES
    for n in range(5)
    for terms in itertools.combinations(LOSS_TERMS, n)
]


def test_the_terms_that_a_model_can_give_come_out_and_no_others():
    for terms, s, p in CASES:
        given = {"image": "image"} | ({"clean": "clean"} if s.clean_stream else {})
        assert {given[name] for name in p.up if name != "hidden"} | {"hidden"} & set(p.up) == {
            term for term in terms if term in (*given.values(), "hidden")
        }
        assert ("text" in p.out) == ("text" in terms and s.text)


def test_every_stream_leaves_where_it_is_needed_and_comes_from_somewhere():
    for terms, s, p in CASES:
        assert set(p.between) <= set(p.ar) and set(p.out) <= set(p.diffusion), (terms, s)
        assert set(p.diffusion) - {"pred"} == set(p.between) - {"pred"}, (terms, s)
        assert bool(p.ar) == bool(p.between) and bool(p.diffusion) == bool(p.out), (terms, s)
        reads = "clean" in p.ar or ("pred" in p.ar and s.blocks > 1)
        assert ("clean" in p.down) == (reads or "hidden" in p.up or "clean" in p.up), (terms, s)
        noisy_hidden = "hidden" in p.up and s.hidden_from == "noisy"
        assert ("noisy" in p.down) == ("pred" in p.diffusion or noisy_hidden), (terms, s)
        if "hidden" in p.up:
            assert "pred" in p.between or (s.hidden_from == "noisy" and "noisy" in p.down), (terms, s)
        assert ("clean" in p.ar) <= (p.clean_blocks > 0) <= s.clean_stream, (terms, s)


def test_another_term_takes_nothing_away_and_no_term_needs_nothing():
    for terms, s, p in CASES:
        for fewer in itertools.combinations(terms, max(0, len(terms) - 1)):
            assert all(set(x) <= set(y) for x, y in zip(_names(training_plan(fewer, s)), _names(p), strict=True)), (
                terms,
                s,
            )
        assert terms or not any(_names(p))


def _names(p: TrainingPlan) -> list[tuple[str, ...]]:
    return [x for x in p if isinstance(x, tuple)]


def test_without_the_hidden_term_the_upsampler_runs_for_the_noise_alone():
    p = training_plan(("image",), EVERYTHING)
    assert p.up == ("image",) and p.down == ("clean", "noisy")
    assert p.diffusion == ("text", "clean", "pred") and p.out == ("pred",)
    assert p.clean_blocks == 3  # the last one is nobody's context
    assert training_plan(("image", "hidden"), EVERYTHING) == p._replace(up=("hidden", "image"))
    assert training_plan(("image", "clean"), EVERYTHING).clean_blocks == 4


def test_switches_of_a_config_are_those_of_its_model():
    c = schema.base()
    for changes in ({}, {"classes": 3, "ar_condition": False}, {"diffusion_attention": "block", "blocks": 16}):
        c.model.update(changes | {"hidden_from": "noisy"})
        assert ablation_switches(c) == madformer.build(c, "cpu").switches
    assert ablation_switches(c) == AblationSwitches(16, True, True, False, "noisy", True)
