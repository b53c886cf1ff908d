import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.diffusion import losses
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import likelihood
from madformer_jax.runtime import partitioning
from tests.small import small

TRAINING = TokenizedTexts(np.array([[0, 2, 3, 2, 3, 1], [0, 2, 2, 1, 1, 1]]), np.array([6, 4]))


def test_unigram_model_mixes_frequencies_with_the_uniform_distribution():
    held_out = TokenizedTexts(np.array([[0, 3, 1, 4]]), np.array([3]))  # the last token is padding
    # The training tokens 2 2 2 2 3 3 1 1 are eight, three of them different.
    counts = {3: 2, 1: 2}
    expected = -sum(np.log2((counts[token] + 3 / 5) / (8 + 3)) for token in (3, 1))
    np.testing.assert_allclose(likelihood.ngram_bits(TRAINING, held_out, 5, 1), [expected])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_the_next_token_sum_to_one(order):
    for history in itertools.product(range(5), repeat=2):
        start = likelihood.ngram_bits(TRAINING, TokenizedTexts(np.array([[0, *history]]), np.array([3])), 5, order)
        longer = TokenizedTexts(np.array([[0, *history, token] for token in range(5)]), np.full(5, 4))
        np.testing.assert_allclose(
            (2.0 ** -(likelihood.ngram_bits(TRAINING, longer, 5, order) - start)).sum(), 1, rtol=1e-9
        )


def test_protocol_depends_on_the_captions_and_ngrams_are_fitted_once(monkeypatch):
    c = schema.base()
    c.loss.text, c.text.vocabulary, c.text.length, c.text.tokenizer = 1.0, 835, 44, "drawings"
    c.data.source = "drawings"
    captions = {"train": ["a red planet"], "test": ["a blue planet"], "composition": ["a green planet"]}
    opened = []

    class Source(list):
        def captions(self, numbers):
            return [self[i] for i in numbers]

    def open_source(c):
        opened.append(c.data.split)
        return Source(captions[c.data.split] * (c.data.drawings // 10_000))

    monkeypatch.setattr(likelihood.sources, "open_source", open_source)
    scorer = likelihood.open_captions(c)
    assert likelihood.open_captions(c).protocol == scorer.protocol
    for field, value in (("evaluate.split", "composition"), ("data.drawings", 40_000)):
        other = c.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        assert likelihood.open_captions(other).protocol != scorer.protocol
    captions["train"] = ["a red landscape"]
    assert likelihood.open_captions(c).protocol != scorer.protocol
    counted = []
    monkeypatch.setattr(likelihood, "model_bits", lambda model, params, texts, mesh: np.ones(len(texts.tokens)))
    monkeypatch.setattr(likelihood, "ngram_bits", lambda *args: counted.append(args[-1]) or np.ones(2))
    assert scorer.scores(None, {}, None).keys() == scorer.scores(None, {}, None).keys() > {"bits"}
    assert counted == [1, 3]
    captions["test"] = ["", " "]
    with pytest.raises(ConfigError, match="captions of split 'test' are all empty"):
        likelihood.open_captions(c)
    opened.clear()
    likelihood.check(c)
    assert opened == ["test"]
    c.evaluate.split = "train"
    assert likelihood.open_captions(c) is None


def test_model_bits_equal_the_loss_and_ignore_padding():
    model, params = small(
        depth=2, diffusion_depth=1, classes=5, text_length=4, unet_channels=(4,), unet_attention=(False,)
    )
    tokens, lengths = np.array([[1, 0, 2, 4], [2, 3, 1, 0], [4, 4, 0, 0]]), np.array([4, 3, 2])
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    with partitioning.scope(mesh):
        bits = likelihood.model_bits(model, params, TokenizedTexts(tokens, lengths), mesh)
        z = jnp.zeros((3, 4, 16, 3))
        apply = jax.jit(
            lambda p: model.apply(
                {"params": p}, z, z, jnp.zeros((3, 4), jnp.int32), jnp.asarray(tokens), terms=("text",)
            )
        )
        loss = losses.unweighted_terms(apply(params), z, z, tokens, lengths)["text"]
    np.testing.assert_allclose(bits.sum() / (lengths - 1).sum(), loss / np.log(2), rtol=1e-5)
