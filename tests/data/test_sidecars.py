"""Tests of unusual caption files: read, or refused in one line."""

import codecs
import os

import numpy as np
import pytest

from madformer_jax.config import schema as config_lib
from madformer_jax.data import sources, tars, text
from madformer_jax.errors import ConfigError
from madformer_jax.modes import tokenizer
from madformer_jax.sampling import prompts
from tests.data.odd_captions import BOM, CAPTIONS, LONE, write_captions
from tests.data.test_tars import write_tar


@pytest.fixture
def c(tmp_path):
    c = config_lib.base()
    c.data.source, c.data.path, c.data.split, c.data.image_size = "folder", str(tmp_path / "images"), "all", 256
    c.text.vocabulary = 300
    return c


@pytest.mark.parametrize("form", ["jsonl", "txt", "beside"])
@pytest.mark.parametrize("oddity", ["", "_bom", "_mark"])
def test_a_byte_order_mark_is_not_part_of_a_caption(form, oddity, c, tmp_path):
    write_captions(tmp_path / "images", form + oddity)
    assert sources.open_source(c).captions(np.arange(5)) == list(CAPTIONS)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("jsonl_surrogate", r"captions.jsonl line 4: 'a red circle \\ud83d on white' is not valid Unicode"),
        ("jsonl_latin", "captions.jsonl is not UTF-8 text"),
        ("txt_latin", "captions.txt is not UTF-8 text"),
        ("beside_latin", "3.txt is not UTF-8 text"),
    ],
)
def test_a_caption_that_is_not_unicode_is_refused_with_its_file(kind, words, c, tmp_path):
    write_captions(tmp_path / "images", kind)
    for call in (sources.open_source, lambda c: tokenizer.run(c, str(tmp_path / "words"))):
        with pytest.raises(ConfigError, match=words) as error:
            call(c)
        assert "\n" not in str(error.value)
        str(error.value).encode()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_of_any_system_end_a_line(end, c, tmp_path):
    write_captions(tmp_path / "images", "txt")
    (tmp_path / "images" / "captions.txt").write_bytes(end.join([b"0.png\ta red", b"1.png\ta blue"]))
    assert sources.open_source(c).captions(np.arange(2)) == ["a red", "a blue"]


@pytest.mark.parametrize("content", [BOM + b"a red circle\n", "\ufeff\ufeffa red circle".encode()])
def test_a_byte_order_mark_is_not_part_of_a_caption_in_a_tar(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tar = tars.Tars(write_tar(tmp_path / "0.tar", {"a.png": b"", "a.txt": content}))
    assert tar.captions(np.arange(1)) == ["a red circle"]


@pytest.mark.parametrize("mark", [BOM, codecs.BOM_UTF8 * 2])
def test_a_byte_order_mark_is_not_part_of_a_prompt(mark, c, tmp_path):
    c.sample.n, c.sample.prompts = 2, str(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_bytes(mark + "a red circle\r\n\ufeffa blue square\r\n".encode())
    assert prompts.load(c) == ["a red circle", "a blue square"]


def test_prompts_that_are_not_unicode_are_refused_in_one_line(c, tmp_path):
    c.sample.prompts = str(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_bytes("a círculo".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"prompts\.txt is not UTF-8 text"):
        prompts.load(c)
    for prompt in (f"a circle {LONE}", os.fsdecode(b"a c\xedrculo")):
        c.sample.prompts = prompt
        with pytest.raises(ConfigError, match="is not valid Unicode") as error:
            prompts.load(c)
        str(error.value).encode()


def test_encoding_refuses_invalid_unicode_and_drops_a_byte_order_mark():
    c = config_lib.base()
    c.text.tokenizer, c.text.length = "drawings", 20
    c.text.vocabulary = text.open_tokenizer("drawings").vocabulary
    plain, marked = (text.encode(c, [caption], str) for caption in ("a red planet", "\ufeffa red planet"))
    np.testing.assert_array_equal(plain.tokens, marked.tokens)
    assert text.encode(c, ["\ufeff"], str).lengths == text.encode(c, [""], str).lengths == 1
    with pytest.raises(ConfigError, match="record 0: .* is not valid Unicode"):
        text.encode(c, [f"a {LONE} planet"], lambda i: f"record {i}")
