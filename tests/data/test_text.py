"""Tests of tokenizers: both kinds of files, training on captions, and error messages."""

import base64
import json

import numpy as np
import pytest
import tokenizers

from madformer_jax.config import schema as config_lib
from madformer_jax.data import text
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError
from tests.data import odd_captions

CAPTIONS = ["a red planet with two moons", "a blue planet in a black sky", "a grün critter"]


@pytest.fixture(params=["json", "ranks"])
def c(request, tmp_path):
    """Config with a trained tokenizer of 300 tokens, or with tiktoken's ranks of 259 tokens."""
    path = tmp_path / "tokenizer"
    if request.param == "json":
        path.write_text(text.train_bpe(CAPTIONS, 300))
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
    tokenizer, texts = text.tokenizer_for_config(c), encode(c, *CAPTIONS, "", "¿x?")
    assert texts.tokens.dtype == texts.lengths.dtype == np.int32
    assert texts.tokens.max() == c.text.vocabulary  # the null token follows the tokenizer's
    for caption, row, length in zip([*CAPTIONS, "", "¿x?"], texts.tokens, texts.lengths):
        if not caption:
            assert row[0] == c.text.vocabulary and length == 1
            continue
        assert row[0] == tokenizer.begin and row[length - 1] == tokenizer.end and tokenizer.begin != tokenizer.end
        assert tokenizer.decode(row[1 : length - 1].tolist()).strip() == caption
    assert texts.lengths[0] < len(CAPTIONS[0])  # some bytes are merged


def test_captions_of_many_records_are_read_in_batches(c):
    sizes = []

    class Captions(Source):
        def captions(self, indices):
            sizes.append(len(indices))
            return list(map(str, indices))

    assert text.record_texts(c, Captions(), np.arange(600)) == list(map(str, range(600)))
    assert max(sizes) <= 256


def test_long_captions_are_an_error_unless_truncated(c):
    c.text.length = 5
    with pytest.raises(ConfigError, match="caption 1: 'a red planet with two moons' is .* tokens long, .*length=5"):
        encode(c, "a", CAPTIONS[0])
    c.text.truncate = True
    truncated, tokenizer = encode(c, CAPTIONS[0]), text.tokenizer_for_config(c)
    assert truncated.lengths == 5 and truncated.tokens[0, -1] == tokenizer.end
    c.text.length = 40
    np.testing.assert_array_equal(truncated.tokens[0, :4], encode(c, CAPTIONS[0]).tokens[0, :4])


def test_a_vocabulary_that_differs_from_the_tokenizers_is_refused(c):
    size, c.text.vocabulary = c.text.vocabulary, 7
    with pytest.raises(
        ConfigError, match=f"vocabulary=7, but .* run from 0 to {size - 1}: set config.text.vocabulary={size}"
    ):
        text.tokenizer_for_config(c)


def test_llama_3_counts_its_special_tokens_behind_the_ranks(c):
    tokenizer = text.tokenizer_for_config(c)
    if tokenizer.vocabulary <= 300:
        pytest.skip("a tokenizer.json names its special tokens itself")
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocabulary) == (259, 260, 259 + 256)


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


# ---- tokenizers of other sources


def opened(path, tokenizer=None):
    """Returns a config with the tokenizer at `path`, after saving `tokenizer` to it if not None."""
    if tokenizer is not None:
        tokenizer.save(str(path))
    c = config_lib.base()
    c.text.tokenizer, c.text.length = str(path), 40
    c.text.vocabulary = text.open_tokenizer(str(path)).vocabulary
    return c


@pytest.mark.parametrize("kind", ["plain", "pad_longest", "pad_12", "trunc_4", "gap", "bom"])
def test_tokens_of_a_caption_depend_on_nothing_else(tmp_path, kind):
    """Ignores settings of the file such as padding, and the other captions of the batch."""
    odd_captions.write_tokenizer(tmp_path / "plain.json", "plain")
    odd_captions.write_tokenizer(tmp_path / f"{kind}.json", kind)
    plain, c = opened(tmp_path / "plain.json"), opened(tmp_path / f"{kind}.json")
    rows, single = encode(c, *odd_captions.CAPTIONS), encode(c, odd_captions.CAPTIONS[0])
    assert rows.lengths.tolist() == [2 + len(caption.split()) for caption in odd_captions.CAPTIONS]
    np.testing.assert_array_equal(rows.tokens[0], single.tokens[0])
    expected = encode(plain, *odd_captions.CAPTIONS).tokens
    words, begin = expected > 3, expected == 0
    np.testing.assert_array_equal(rows.tokens[words], expected[words] + 50 * (kind == "gap"))
    np.testing.assert_array_equal(rows.tokens == 0, begin)


def test_a_vocabulary_with_gaps_reaches_to_its_highest_id(tmp_path):
    odd_captions.write_tokenizer(tmp_path / "gap.json", "gap")
    c = opened(tmp_path / "gap.json")
    entries = 4 + len(set(" ".join(odd_captions.CAPTIONS).split()))
    assert c.text.vocabulary == encode(c, *odd_captions.CAPTIONS).tokens.max() + 1 == entries + 50
    c.text.vocabulary = entries
    with pytest.raises(ConfigError, match=f"vocabulary={entries}, but .* 0 to {entries + 49}: .*={entries + 50}"):
        text.tokenizer_for_config(c)


def test_tokens_are_deterministic(tmp_path):
    spec = json.loads(text.train_bpe(CAPTIONS, 300))
    spec["model"]["dropout"] = 0.5
    (tmp_path / "dropout.json").write_text(json.dumps(spec))
    c = opened(tmp_path / "dropout.json")
    rows = encode(c, *[CAPTIONS[0]] * 20)
    assert (rows.tokens == rows.tokens[0]).all()


def unigram(unk_id=0, alphabet="▁abcderil</>s"):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -4.0) for letter in alphabet), ("▁red", -3.0)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=unk_id))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return model


def letters(unk=None, inside=True):
    """Returns a BPE without merges that knows a few letters.

    Args:
      unk: Its unknown token.
      inside: Whether its control tokens are part of the model.
    """
    control = ["<s>", "</s>"] * inside
    words = {word: i for i, word in enumerate([*control, *"red</s>"])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token=unk))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>", "</s>"])
    return model


@pytest.mark.parametrize(
    "tokenizer",
    [
        unigram(),
        unigram(unk_id=None),
        letters(),
        letters(inside=False),
        letters("<unk>"),
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "red": 2}, unk_token="[none]")),
    ],
    ids=[
        "unigram",
        "unigram without unknown",
        "bpe without unknown",
        "bpe alone",
        "bpe, unknown is missing",
        "words, missing",
    ],
)
def test_an_unknown_part_is_an_error_in_every_kind_of_model(tokenizer, tmp_path):
    c = opened(tmp_path / "tokenizer.json", tokenizer)
    assert encode(c, "red").lengths > 2
    with pytest.raises(ConfigError, match="caption 1: 'red Ü' has a part that the tokenizer does not know"):
        encode(c, "red", "red Ü")


def test_names_of_control_tokens_are_text(c):
    """Checks that no caption can end itself."""
    tokenizer = text.tokenizer_for_config(c)
    for word in (text.BEGIN, text.END, "<|endoftext|>", "</s>"):
        row = encode(c, f"a red {word} planet")
        inner = row.tokens[0, 1 : row.lengths[0] - 1].tolist()
        assert not {tokenizer.begin, tokenizer.end} & set(inner)
        assert tokenizer.decode(inner).strip() == f"a red {word} planet"


@pytest.mark.parametrize("tokenizer", [unigram(), letters()], ids=["unigram", "bpe"])
def test_names_of_control_tokens_are_text_to_other_tokenizers(tokenizer, tmp_path):
    c = opened(tmp_path / "tokenizer.json", tokenizer)
    row = encode(c, "red </s> red")
    inner = row.tokens[0, 1 : row.lengths[0] - 1].tolist()
    assert not {0, 1, 2} & set(inner) if isinstance(tokenizer.model, tokenizers.models.Unigram) else 1 not in inner
    assert "</s>" in text.tokenizer_for_config(c).decode(inner).replace(" ", "")


def test_a_control_token_that_cannot_be_spelled_is_refused(tmp_path):
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "red": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    c = opened(tmp_path / "words.json", model)
    with pytest.raises(
        ConfigError, match="caption 0: 'red </s>' holds </s>, which the tokenizer can read only as a control"
    ):
        encode(c, "red </s>")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"{}", "is not a tokenizer.json"),
        (b"hello", "neither a tokenizer.json nor"),
        (b"YQ== 0\nYg== 2\n", "is damaged: ranks are missing"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, content, words):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        text.open_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_the_embedded_tokenizer_knows_the_words_of_drawings():
    (tokens,) = text.open_tokenizer("drawings").encode(["a light purple critter shaped like a mound, on pale orange"])
    assert len(tokens) == 12
