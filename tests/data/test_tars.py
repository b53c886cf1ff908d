"""Tests of source webdataset."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.data import pipeline, preprocess, source, tars, text
from madformer_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def image(value: int, kind="WEBP") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(file, kind, lossless=True)
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def shades(dataset: source.Source, *numbers: int) -> list[int]:
    images = dataset.read(np.array(numbers)).arrays["image"]
    return preprocess.Preprocessor(4, 3, crop=True).process_batch(images).mean((1, 2, 3)).tolist()


def test_captions_are_tokenized_and_missing_ones_are_the_null_token(tmp_path):
    members = {f"{i}.webp": image(10 * i) for i in range(3)} | {"0.txt": b"a red planet", "2.txt": b"on pale blue"}
    c = config_lib.base()
    c.data.source, c.data.path, c.data.split = "webdataset", write_tar(tmp_path / "x.tar", members), "all"
    c.data.image_size, c.seed = 4, 1
    tokenizer = text.open_tokenizer("drawings")
    c.text.tokenizer, c.text.vocabulary, c.text.length = "drawings", tokenizer.vocabulary, 6
    iterator = pipeline.train_iterator(c, batch=3)
    batch = next(iterator)
    iterator.close()
    captions = []
    for tokens, length, shade in zip(batch["tokens"], batch["lengths"], batch["image"].mean((1, 2, 3))):
        assert tokens.dtype == np.int32 and tokens.shape == (6,)
        is_null = tokens[0] == tokenizer.vocabulary
        assert length == 1 if is_null else (tokens[0], tokens[length - 1]) == (tokenizer.begin, tokenizer.end)
        captions.append((round(shade / 10), "" if is_null else tokenizer.decode(tokens[1 : length - 1]).strip()))
    assert sorted(captions) == [(0, "a red planet"), (1, ""), (2, "on pale blue")]


def test_images_alone_as_ffhq_is_published(tmp_path):
    write_tar(tmp_path / "ffhq" / "001.tar", {"00002.webp": image(20), "00003.webp": image(30)})
    write_tar(tmp_path / "ffhq" / "000.tar", {"00000.webp": image(0), "00001.webp": image(10)})
    ffhq = tars.Tars(str(tmp_path / "ffhq"))
    assert shades(ffhq, 3, 0, 2, 1) == [30, 0, 20, 10]
    assert ffhq.classes == 0 and ffhq.read(np.array([2])).labels == 0
    assert ffhq.name(2).endswith("001.tar:00002.webp")
    assert shades(pickle.loads(pickle.dumps(ffhq)), 1) == [10]


def test_sidecars_give_labels_and_captions(tmp_path):
    members = {
        "a/0.cls": b"4\n", "a/0.webp": image(40), "b/0.jpg": image(50, "JPEG"), "b/0.txt": " grün ".encode(),
        "b/0.json": json.dumps({"label": 2, "width": 6}).encode(), "notes.md": b"?", "._c.webp": b"mac",
    }  # fmt: skip
    dataset = tars.Tars(write_tar(tmp_path / "x.tar", members))
    read = dataset.read(np.arange(2))
    assert shades(dataset, 0, 1) == [40, 50] and read.labels.tolist() == [4, 2] and read.captions == ["", "grün"]
    assert len(dataset) == 2 and dataset.classes == 5


def test_the_index_is_made_once_and_again_when_a_tar_changes(tmp_path, cache, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {"0.webp": image(10)})
    tars.Tars(path)
    walk = tars._build_index
    monkeypatch.setattr(tars, "_build_index", None)
    assert shades(tars.Tars(path), 0) == [10]
    monkeypatch.setattr(tars, "_build_index", walk)
    write_tar(tmp_path / "x.tar", {"0.webp": image(30), "1.webp": image(10)})
    assert shades(tars.Tars(path), 0, 1) == [30, 10]


def test_a_damaged_index_is_made_again(tmp_path, cache):
    members = {"0.webp": image(10), "0.txt": b"a cat", "0.cls": b"1", "1.webp": image(20), "1.cls": b"0"}
    path = write_tar(tmp_path / "x.tar", members)
    wanted = tars.Tars(path).fingerprint
    (file,) = (cache / "madformer_jax" / "tars").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], *(_flipped(whole, i) for i in range(0, len(whole), 7))):
        file.write_bytes(damaged)
        dataset = tars.Tars(path)
        assert file.read_bytes() == whole and dataset.fingerprint == wanted and shades(dataset, 1, 0) == [20, 10]


def _flipped(content: bytes, i: int) -> bytes:
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def test_a_worker_gets_the_index_by_name(tmp_path, cache):
    """Pickles no part of the index, and a long caption takes only its own length in the index."""
    members = {f"{i}.webp": image(i) for i in range(200)} | {"7.txt": b"long " * 2000}
    dataset = tars.Tars(write_tar(tmp_path / "x.tar", members))
    assert len(pickle.dumps(dataset)) < 2000
    (file,) = (cache / "madformer_jax" / "tars").iterdir()
    assert file.stat().st_size < 30_000
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read(np.array([6, 7])).captions == ["", "long " * 1999 + "long"]
    assert shades(copy, 9) == [9] and copy.name(8) == f"{tmp_path}/x.tar:8.webp"


def test_tars_are_read_without_a_cache_folder(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    dataset = tars.Tars(write_tar(tmp_path / "x.tar", {"0.webp": image(10), "0.txt": b"a cat"}))
    assert pickle.loads(pickle.dumps(dataset)).read(np.array([0])).captions == ["a cat"]


def test_the_split_does_not_depend_on_the_folder(tmp_path):
    write_tar(tmp_path / "a" / "x" / "0.tar", {f"{i}.webp": b"" for i in range(100)})
    before = tars.Tars(str(tmp_path / "a")).split_indices(0.3)
    assert 15 < before.sum() < 45
    (tmp_path / "a").rename(tmp_path / "b")
    np.testing.assert_array_equal(tars.Tars(str(tmp_path / "b")).split_indices(0.3), before)


def test_the_split_does_not_depend_on_cached_indexes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a" / "x" / "0.tar", {f"{i}.webp": b"" for i in range(100)})
    of_folder, of_tar = (tars.Tars(p).split_indices(0.3) for p in (str(tmp_path / "a"), path))
    assert (of_folder != of_tar).any()  # by the names x/0.tar:... and 0.tar:...
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    np.testing.assert_array_equal(tars.Tars(path).split_indices(0.3), of_tar)


def test_tars_feed_the_pipeline(tmp_path):
    c = config_lib.base()
    for t in range(2):
        write_tar(tmp_path / f"{t}.tar", {f"{i}.webp": image(10 * i + 100 * t) for i in range(5)})
    c.data.source, c.data.path, c.data.image_size = "webdataset", str(tmp_path), 4
    c.data.split = "all"
    iterator = pipeline.train_iterator(c, batch=10)
    values = next(iterator)["image"][:, 0, 0, 0]
    iterator.close()
    assert sorted(values) == [0, 10, 20, 30, 40, 100, 110, 120, 130, 140]


@pytest.mark.parametrize(
    "members, message",
    [
        ({}, "holds no image"),
        ({"0.txt": b"hello"}, "holds no image"),
        ({"0.webp": b"", "0.cls": b"-1"}, "class -1 is out of range"),
        ({"0.webp": b"", "0.json": b'{"label": 9999999999}'}, "class 9999999999 is out of range"),
        ({"0.webp": b"", "0.cls": b"cat"}, "x.tar:0.cls holds no class number"),
        (
            {"0.webp": b"", "0.cls": b"1", "1.webp": b""},
            "x.tar:1.webp has no label.*1 of 2 images have no usable label",
        ),
        ({"0.webp": b"", "0.json": b'{"label": 1.5}'}, "x.tar:0.json holds no class number"),
        ({"0.webp": b"", "0.txt": b"\xff"}, "x.tar:0.txt is not UTF-8 text"),
        ({"0.webp": b"", "0.png": b""}, "x.tar:0.png: the tar has another image of this sample"),
    ],
)
def test_wrong_content_is_refused(tmp_path, members, message):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ConfigError, match=message):
        tars.Tars(path)


def add(path: str, name: str, **fields) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info)


def test_repeated_members_and_links_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/0.webp": image(1), "b/0.webp": image(2)})
    assert len(tars.Tars(path)) == 2  # other folders: other samples
    add(path, "a/0.webp")
    with pytest.raises(ConfigError, match="x.tar:a/0.webp: the tar has another image of this sample"):
        tars.Tars(path)
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        path = write_tar(tmp_path / "y.tar", {"0.webp": image(1)})
        add(path, "1.webp", type=kind, linkname="0.webp")
        with pytest.raises(ConfigError, match="y.tar:1.webp is a link or not a plain file"):
            tars.Tars(path)


def test_files_that_are_not_tars_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \.tar file"):
        tars.Tars(str(tmp_path))
    path = write_tar(tmp_path / "x.tar", {"0.webp": bytes(5000)})
    os.truncate(path, 3000)
    with pytest.raises(ConfigError, match="x.tar is (cut off|not a plain tar file or is damaged)"):
        tars.Tars(path)
