import shutil

import pytest
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.modes import tokenizer


@pytest.fixture
def c(tmp_path):
    """A config of three images, two of them with captions."""
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.txt").write_text("0.png\ta red planet\n2.png\ta red planet with two moons\n")
    c = config_lib.base()
    c.data.source, c.data.path, c.data.split, c.data.image_size = "folder", str(tmp_path), "all", 256
    c.text.vocabulary = 270
    return c


def test_tokenizer_is_trained_on_captions_and_reports_the_longest(c, tmp_path):
    result = tokenizer.run(c, str(tmp_path / "words"))
    assert result["path"] == str(tmp_path / "words" / "tokenizer.json")
    c.text.tokenizer, c.text.vocabulary, c.text.length = result["path"], result["vocabulary"], result["longest"]
    texts = text.encode(c, ["a red planet with two moons"], str)
    assert texts.lengths == result["longest"]
    assert tokenizer.run(c, str(tmp_path / "again"))["longest"] == result["longest"]
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "words" / "tokenizer.json").read_bytes()


def test_other_processes_wait_until_the_first_has_written(c, tmp_path, monkeypatch):
    first = tokenizer.run(c, str(tmp_path / "words"))
    monkeypatch.setattr(tokenizer.jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        tokenizer.partitioning, "sync", lambda name: shutil.copytree(tmp_path / "words", tmp_path / "new")
    )
    assert tokenizer.run(c, str(tmp_path / "new")) == first | {"path": str(tmp_path / "new" / "tokenizer.json")}


def test_missing_captions_and_a_small_vocabulary_are_errors(c, tmp_path):
    c.text.vocabulary = 100
    with pytest.raises(ConfigError, match="vocabulary=100 is too small for --mode=tokenizer: use at least 258"):
        tokenizer.run(c, str(tmp_path / "words"))
    c.text.vocabulary = 300
    (tmp_path / "captions.txt").unlink()
    with pytest.raises(ConfigError, match="source=folder has no captions"):
        tokenizer.run(c, str(tmp_path / "words"))
