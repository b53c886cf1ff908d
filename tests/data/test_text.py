"""Tokenizers: files of two kinds, one trained on captions, and the errors of a user."""

import base64

import numpy as np
import pytest
import tokenizers

from madformer_jax import config as config_lib
from madformer_jax.data import text
from madformer_jax.errors import ConfigError

CAPTIONS = ["a red planet with two moons", "a blue planet in a black sky", "a grün critter"]


@pytest.fixture(params=["json", "ranks"])
def c(request, tmp_path):
    """A config with a tokenizer of 300 tokens of our own, or with tiktoken's ranks of bytes and a few words."""
    path = tmp_path / "tokenizer"
    if request.param == "json":
        path.write_text(text.train(CAPTIONS, 300))
    else:
        ranks = [*(bytes([byte]) for byte in range(256)), b"re", b"red", b" p"]
        path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(ranks)))
    c = config_lib.base()
    c.text.tokenizer, c.text.length = str(path), 40
    c.text.vocabulary = text.open_tokenizer(str(path)).vocabulary
    return c


def encode(c, *texts):
    return text.encode(c, texts, lambda i: f"caption {i}")


def test_a_caption_is_begin_its_tokens_and_end(c):
    found, texts = text.of(c), encode(c, *CAPTIONS, "", "¿x?")
    assert texts.tokens.dtype == texts.lengths.dtype == np.int32
    assert texts.tokens.max() == c.text.vocabulary  # "none" stands behind the tokenizer's
    for caption, row, length in zip([*CAPTIONS, "", "¿x?"], texts.tokens, texts.lengths):
        if not caption:
            assert row[0] == c.text.vocabulary and length == 1
            continue
        assert row[0] == found.begin and row[length - 1] == found.end and found.begin != found.end
        assert found.decode(row[1 : length - 1].tolist()).strip() == caption
    assert texts.lengths[0] < len(CAPTIONS[0])  # some bytes are merged


def test_what_is_too_long_is_an_error_or_cut_by_a_setting(c):
    c.text.length = 5
    with pytest.raises(ConfigError, match="caption 1: 'a red planet with two moons' is .* tokens long, .*length=5"):
        encode(c, "a", CAPTIONS[0])
    c.text.truncate = True
    cut, found = encode(c, CAPTIONS[0]), text.of(c)
    assert cut.lengths == 5 and cut.tokens[0, -1] == found.end
    c.text.length = 40
    np.testing.assert_array_equal(cut.tokens[0, :4], encode(c, CAPTIONS[0]).tokens[0, :4])


def test_another_vocabulary_than_the_tokenizers_is_told(c):
    given, c.text.vocabulary = c.text.vocabulary, 7
    with pytest.raises(ConfigError, match=f"vocabulary=7, but .* set config.text.vocabulary={given}"):
        text.of(c)


def test_llama_3_counts_its_special_tokens_behind_the_ranks(c):
    found = text.of(c)
    if found.vocabulary > 300:
        assert (found.begin, found.end, found.vocabulary) == (259, 260, 259 + 256)


def test_a_part_that_the_tokenizer_does_not_know_is_an_error(tmp_path):
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "red": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    c = config_lib.base()
    c.text.tokenizer, c.text.vocabulary, c.text.length = str(tmp_path / "words.json"), 4, 6
    assert encode(c, "red red").tokens[0, :4].tolist() == [1, 3, 3, 2]
    with pytest.raises(ConfigError, match="caption 0: 'red slug' has a part that the tokenizer does not know"):
        encode(c, "red slug")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"{}", "is no tokenizer.json"),
        (b"hello", "neither a tokenizer.json nor"),
        (b"YQ== 0\nYg== 2\n", "is damaged: ranks are missing"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_told(tmp_path, content, words):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        text.open_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_the_embedded_tokenizer_knows_the_words_of_drawings():
    found = text.open_tokenizer("drawings")
    (tokens,) = found.encode(["a light purple critter shaped like a mound, on pale orange"])
    assert len(tokens) == 12
