"""Plans for all terms and switches; test_madformer and test_flops check the model and its cost."""

import itertools

from madformer_jax.config import schema
from madformer_jax.config.choices import LOSS_TERMS
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


def test_outputs_are_the_requested_terms_that_the_model_has():
    for terms, s, p in CASES:
        available = {"image", "hidden"} | ({"clean"} if s.clean_stream else set())
        assert set(p.upsampled) == available & set(terms)
        assert ("text" in p.diffusion_outputs) == ("text" in terms and s.text)


def test_streams_are_inputs_before_they_are_outputs():
    for terms, s, p in CASES:
        assert set(p.ar_outputs) <= set(p.ar_inputs) and set(p.diffusion_outputs) <= set(p.diffusion_inputs), (terms, s)
        assert set(p.diffusion_inputs) - {"pred"} == set(p.ar_outputs) - {"pred"}, (terms, s)
        assert bool(p.ar_inputs) == bool(p.ar_outputs) and bool(p.diffusion_inputs) == bool(p.diffusion_outputs), (
            terms,
            s,
        )
        reads = "clean" in p.ar_inputs or ("pred" in p.ar_inputs and s.blocks > 1)
        assert ("clean" in p.downsampled) == (reads or "hidden" in p.upsampled or "clean" in p.upsampled), (terms, s)
        noisy_hidden = "hidden" in p.upsampled and s.hidden_from == "noisy"
        assert ("noisy" in p.downsampled) == ("pred" in p.diffusion_inputs or noisy_hidden), (terms, s)
        if "hidden" in p.upsampled:
            assert "pred" in p.ar_outputs or (s.hidden_from == "noisy" and "noisy" in p.downsampled), (terms, s)
        assert ("clean" in p.ar_inputs) <= (p.clean_blocks > 0) <= s.clean_stream, (terms, s)


def test_plans_grow_with_the_terms_and_are_empty_without_terms():
    for terms, s, p in CASES:
        for fewer in itertools.combinations(terms, max(0, len(terms) - 1)):
            assert all(set(x) <= set(y) for x, y in zip(_names(training_plan(fewer, s)), _names(p), strict=True)), (
                terms,
                s,
            )
        assert terms or not any(_names(p))


def _names(p: TrainingPlan) -> list[tuple[str, ...]]:
    return [x for x in p if isinstance(x, tuple)]


def test_upsampler_runs_once_without_the_hidden_term():
    p = training_plan(("image",), EVERYTHING)
    assert p.upsampled == ("image",) and p.downsampled == ("clean", "noisy")
    assert p.diffusion_inputs == ("text", "clean", "pred") and p.diffusion_outputs == ("pred",)
    assert p.clean_blocks == 3  # no other block attends to the last one
    assert training_plan(("image", "hidden"), EVERYTHING) == p._replace(upsampled=("hidden", "image"))
    assert training_plan(("image", "clean"), EVERYTHING).clean_blocks == 4


def test_switches_are_those_of_the_config():
    c = schema.base()
    c.model.update({"classes": 3, "ar_condition": False, "diffusion_attention": "block", "hidden_from": "noisy"})
    assert ablation_switches(c) == AblationSwitches(16, True, True, False, "noisy", True)
