"""The model card of an export."""

from madformer_jax.publishing import model_card
from tests import tiny

NAMES = ["1", "10", "a|b", "tench, Tinca tinca", *"cdefgh"]


def test_a_card_lists_class_names():
    images = {"solver": "ddim", "spacing": "trailing", "steps": 4, "guidance": 1.0, "labels": "3,0,3"}
    result = {"protocol": {"n": 50, "reference": "abc", "images": images}, "scores": {}}
    text = model_card.render(tiny.get_config(), 7, 100, [result], grid=False, names=NAMES)
    assert "| classes | 1, 10, a\\|b, tench, Tinca tinca, c, d, e, f, ... |" in text
    assert 'model.sample(labels=["1", "10"])' in text
    assert "| ddim | trailing | 4 | 1.0 | 50 | tench, Tinca tinca, 1 | abc |" in text
    unnamed = model_card.render(tiny.get_config(), 7, 100, [result], grid=False)
    assert (
        "model.sample(labels=[0, 1])" in unnamed and "| class 3, class 0 |" in unnamed and "| classes |" not in unnamed
    )
