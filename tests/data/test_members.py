"""Tests of unusual tars: names with dots, odd labels, hidden members, several streams."""

import json
import os
import tarfile

import numpy as np
import pytest

from madformer_jax.data import listing, tars
from madformer_jax.errors import ConfigError
from tests.data.test_tars import cache, image, shades, write_tar  # noqa: F401  cache: a fixture


def names(source: tars.Tars) -> list[str]:
    return [source.name(i).partition(".tar:")[2] for i in range(len(source))]


@pytest.fixture(autouse=True)
def _warnings_alone(caplog):
    caplog.set_level("WARNING", "absl")


@pytest.fixture
def opened(tmp_path):
    """Returns a function that opens a tar of members; a number is an image of that gray value."""

    def make(members, **options) -> tars.Tars:
        content = {name: image(x, "PNG") if isinstance(x, int) else x for name, x in members.items()}
        return tars.Tars(write_tar(tmp_path / "x.tar", content), **options)

    return make


@pytest.mark.parametrize(
    "members",
    [
        ["v1.0.png", "v1.1.png", "v1.2.png"],
        ["0001.png", "photo 22.05.png", "photo 22.06.png", "img_v2.0.jpg", "d.v1/0003.png"],
        ["st.john.png", "st.peter.png", "www.a.com_1.png", "www.a.com_2.png"],
        ["img.png", "img.1.png", "img.2.png"],
        ["J.R.R. Tolkien.png", "J.R.R. Smith.png", "J.png"],
        ["a..png", "b...png"],
        ["0.rgb.png", "1.rgb.png"],
        ["x" * 150 + "/0.png", "x" * 250 + ".png"],
        ["0.PNG", "1.JPeG", "2.bmp", "3.gif", "4.TIFF", "5.avif"],
        ["c d%20.png", "\U0001f600.png", "a\nb.png", "\udcff.png"],
    ],
)
def test_every_image_is_a_sample(opened, caplog, members):
    source = opened({name: i for i, name in enumerate(members)})
    assert shades(source, *range(len(source))) == list(range(len(members)))
    assert not caplog.text and all("\n" not in name for name in names(source))


def test_other_streams_of_a_sample_are_left_out_and_logged(opened, tmp_path, caplog):
    members = {}
    for i in range(3):
        members |= {f"{i}.jpg": 10 * i, f"{i}.seg.png": 99, f"{i}.left.depth.tif": 99, f"{i}.cls": b"%d" % i}
        members |= {f"{i}.npy": b"?", f"{i}.crop.json": b"{}"}
    source = opened(members)
    assert shades(source, 0, 1, 2) == [0, 10, 20] and source.read(np.arange(3)).labels.tolist() == [0, 1, 2]
    (line,) = [record.getMessage() for record in caplog.records]
    tar = f"{tmp_path}/x.tar:"
    assert line.startswith(f"{tmp_path}/x.tar: left out of the tars: ")
    for entry in (
        f".seg.png beside an image of the same sample: 3 ({tar}0.seg.png, {tar}1.seg.png, ...)",
        f".left.depth.tif beside an image of the same sample: 3 ({tar}0.left.depth.tif",
        f".npy: 3 ({tar}0.npy",
        f".json members without an image: 3 ({tar}0.crop.json",
    ):
        assert entry in line


def test_several_streams_without_a_plain_name_are_refused(opened):
    with pytest.raises(ConfigError, match=r"x.tar: sample '0' has two images, \.rgb\.png and \.seg\.png: pack one"):
        opened({f"{i}.{stream}.png": i for i in range(2) for stream in ("rgb", "seg")})


def test_sidecars_belong_to_the_stem_or_else_to_the_sample(opened):
    members = {
        "v1.0.png": 0,
        "v1.0.cls": b"3",
        "v1.0.txt": b"a",
        "v1.1.png": 1,
        "v1.1.json": b'{"label": 2}',
        "v1.1.txt": b"b",
    }
    source = opened(members | {"7.rgb.png": 2, "7.cls": b"1", "7.txt": b"c"})
    read = source.read(np.arange(3))
    assert read.labels.tolist() == [3, 2, 1] and read.captions == ["a", "b", "c"]


def test_the_label_of_another_image_is_not_taken(opened):
    with pytest.raises(ConfigError, match=r"v1\.0\.png has no label.*1 of 2 images have no usable label"):
        opened({"v1.png": 0, "v1.cls": b"1", "v1.0.png": 1})


@pytest.mark.parametrize(("first", "second"), [("./", ""), ("", "./"), ("a/", "./a/"), ("./a/./", "a//")])
def test_prefixes_of_the_same_folder_are_one(opened, first, second):
    source = opened({f"{first}0.png": 5, f"{second}0.cls": b"1", f"{second}0.txt": b"a cat"})
    assert source.read(np.arange(1)).labels.tolist() == [1] and source.captions(np.arange(1)) == ["a cat"]
    assert names(source) == [f"{first}0.png"]  # the name as stored decides the split


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("cls", "1"), ("cls", "1\n"), ("cls", " 1\r\n"), ("cls", "\ufeff1"), ("cls", "1.0"), ("cls", "+1"), ("cls", "001"),
        ("json", 1), ("json", 1.0), ("json", "1"), ("json", "1.0"), ("json", " 1 "), ("json", True), ("CLS", "1"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(opened, kind, content):
    text = json.dumps({"label": content}) if kind == "json" else content
    for mark in ("", "\ufeff") if kind == "json" else ("",):
        source = opened({"0.png": 0, f"0.{kind}": (mark + text).encode()})
        assert source.classes == 2 and source.read(np.arange(1)).labels.tolist() == [1]


def test_names_in_json_are_classes(opened):
    labels = ["dog", "cat", "tench, Tinca tinca", "cat "]
    source = opened(
        {f"{i}.png": i for i in range(4)}
        | {f"{i}.json": json.dumps({"label": x}).encode() for i, x in enumerate(labels)}
    )
    assert source.names == ("cat", "dog", "tench, Tinca tinca") and source.classes == 3
    assert source.read(np.arange(4)).labels.tolist() == [1, 0, 2, 0]


def test_numbers_among_names_are_odd(opened):
    members = {f"{i}.png": i for i in range(20)} | {
        f"{i}.json": b'{"label": "%s"}' % b"ba"[i % 2 :][:1] for i in range(19)
    }
    source = opened(members | {"19.json": b'{"label": 7}'})
    assert source.names == ("a", "b") and source.read(np.arange(19)).labels.tolist() == [(i + 1) % 2 for i in range(19)]
    with pytest.raises(
        ConfigError, match="a label is the number 7, and most are names: 1 of 20 images have no usable label"
    ):
        opened(members | {"19.json": b'{"label": 7}'}, max_unlabeled=0)


def test_json_without_a_label_is_logged(opened, caplog):
    source = opened(
        {
            "0.png": 0,
            "0.json": b'[{"bbox": [1, 2]}]',
            "1.png": 1,
            "1.json": b"3",
            "2.png": 2,
            "2.json": b'{"label": " "}',
        }
    )
    assert source.classes == 0 and shades(source, 0, 1, 2) == [0, 1, 2]
    assert ".json members without a label: 3 (" in caplog.text


def test_a_name_beside_a_number_is_logged(opened, caplog):
    source = opened({"0.png": 0, "0.json": b'{"label": "cat"}', "0.cls": b"1"})
    assert source.classes == 2 and "labels in .json members beside a .cls: 1 (" in caplog.text


ODD = {
    "cat.cls": b"cat", "empty.cls": b"", "minus.cls": b"-1", "half.cls": b"1.5", "large.cls": b"9" * 30, "latin.cls": b"\xff",
    "list.json": b'{"label": [1]}', "half.json": b'{"label": 0.5}', "cut.json": b'{"label": 1', "nan.json": b'{"label": NaN}',
    "name.json": b'{"label": "cat"}', "latin.json": b'{"label": "caf\xe9"}', "deep.json": b"[" * 100_000,
    "large.json": b'{"label": 1' + b"0" * 5000 + b"}", "half a character.json": b'{"label": "\\ud800"}', "none.npy": b"",
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_label_leaves_out_its_image_and_many_are_refused(opened, caplog, odd):
    stem, suffix = os.path.splitext(odd)
    members = {f"{stem}.png": 99, f"{stem}{suffix}": ODD[odd]}
    for i in range(19):
        members |= {f"{i}.png": i, f"{i}.cls": b"%d" % (i % 3)}
    source = opened(members)
    assert len(source) == 19 and shades(source, *range(19)) == list(range(19)) and source.names == ("0", "1", "2")
    assert source.read(np.arange(19)).labels.tolist() == [i % 3 for i in range(19)]
    assert names(source)[18] == "18.png" and source.split_indices(1.0).shape == (19,)
    (line,) = [r.getMessage() for r in caplog.records if "left out of the tars" not in r.getMessage()]
    assert (
        f"x.tar:{stem}." in line
        and "1 of 20 images have no usable label; they are left out" in line
        and "\n" not in line
    )
    with pytest.raises(
        ConfigError, match=r"1 of 20 images have no usable label, more than config\.data\.max_corrupt=0\.04"
    ):
        opened(members, max_unlabeled=0.04)


def test_an_odd_label_among_unlabeled_images_is_ignored_and_logged(opened, caplog):
    members = {f"{i}.png": i for i in range(20)} | {"0.cls": b"cat"}
    assert len(opened(members)) == 20 and opened(members).classes == 0
    assert (
        "x.tar:0.cls holds no class number: 1 of 20 images have no usable label; the labels are ignored" in caplog.text
    )


def test_two_numbers_that_differ_are_refused(opened):
    with pytest.raises(
        ConfigError, match=r"x\.tar:0\.cls says class 1, and .*0\.json says 2: 1 of 1 images have no usable"
    ):
        opened({"0.png": 0, "0.cls": b"1", "0.json": b'{"label": 2}'})


def test_log_lines_are_repeated_for_a_cached_index(opened, tmp_path, caplog, monkeypatch):
    opened({"0.png": 0, "0.json": b'{"label": "cat"}', "a.npy": b""})
    caplog.clear()
    listing.warn_once.cache_clear()
    monkeypatch.setattr(tars, "_build_index", None)
    assert tars.Tars(f"{tmp_path}/x.tar").names == ("cat",) and ".npy: 1 (" in caplog.text


def test_an_ordinary_set_keeps_its_fingerprint(tmp_path):
    """Compares with a fingerprint made by the version before suffixes decided what is an image."""
    members = {
        "a/0.webp": b"x",
        "a/0.cls": b"4\n",
        "b/1.jpg": b"yy",
        "b/1.json": b'{"label": 2}',
        "b/1.txt": " grün ".encode(),
    }
    source = tars.Tars(write_tar(tmp_path / "x.tar", members))
    assert source.fingerprint == "082e6d71d8b3ed3d20875869c2f5b33248115c58fefb99e6be417e5313ab614d"


@pytest.mark.parametrize("name", ["._0.tar", ".ipynb_checkpoints/0-checkpoint.tar", "__MACOSX/._0.tar", "@eaDir/0.tar"])
def test_hidden_tars_are_not_read(tmp_path, name):
    write_tar(tmp_path / "set" / "0.TAR", {"0.png": image(3, "PNG")})
    write_tar(tmp_path / "set" / name, {"1.png": b""})
    source = tars.Tars(str(tmp_path / "set"))
    assert shades(source, 0) == [3] and len(source) == 1


def test_hidden_members_are_not_read(opened):
    hidden = ["./._0.png", "__MACOSX/._0.png", "__MACOSX/0.png", ".ipynb_checkpoints/0.png", "a/@eaDir/0.png/THUMB.jpg"]
    assert names(opened({"./0.png": 0, "../1.png": 1} | dict.fromkeys(hidden, 9))) == ["./0.png", "../1.png"]


def test_other_files_beside_tars_and_empty_tars_are_logged(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", {"0.png": image(1, "PNG")})
    write_tar(tmp_path / "1.tar", {})
    (tmp_path / "2.tar.gz").write_bytes(b"")
    assert len(tars.Tars(str(tmp_path))) == 1
    assert ".gz: 1 (" in caplog.text and f"tars without an image: 1 ({tmp_path}/1.tar)" in caplog.text


@pytest.mark.parametrize(("mode", "kind"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_a_compressed_tar_is_refused_by_its_kind(tmp_path, mode, kind):
    with tarfile.open(tmp_path / "0.tar", f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(ConfigError, match=rf"0\.tar is not a plain tar file but compressed \({kind}\)"):
        tars.Tars(str(tmp_path))
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"0\.tar is empty \(0 bytes\)"):
        tars.Tars(str(tmp_path))
