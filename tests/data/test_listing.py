"""Tests of listing folders with links, hidden names and files that are not images."""

import os

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.data import listing, preprocess
from madformer_jax.data.folder import Folder
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images


def save(path, value: int = 0) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG", ".dat": "PNG"}.get(listing.suffix(os.fsdecode(path)))
    Image.new("RGB", (4, 4), (value, value, value)).save(path, kind)


def keys(folder: Folder, root) -> list[str]:
    return [folder.name(i).removeprefix(f"{root}/") for i in range(len(folder))]


def shades(folder: Folder) -> list[int]:
    encoded = folder.read(np.arange(len(folder))).arrays["image"]
    return preprocess.Preprocessor(1, 3, crop=True).process_batch(encoded)[:, 0, 0, 0].tolist()


@pytest.fixture
def pets(tmp_path):
    """Two classes of two images."""
    for i, name in enumerate(("cats/0.png", "cats/1.png", "dogs/0.png", "dogs/1.png")):
        save(tmp_path / name, i)
    return tmp_path


ALL = ["cats/0.png", "cats/1.png", "dogs/0.png", "dogs/1.png"]


@pytest.mark.parametrize(
    "junk",
    [
        "cats/.ipynb_checkpoints/0-checkpoint.png", "cats/.thumbnails/large/0.png", "dogs/@eaDir/0.png/THUMB_M.jpg",
        "__MACOSX/cats/0.png", "__MACOSX/0.png", "cats/__MACOSX/0.png", "#recycle/0.png", "$RECYCLE.BIN/0.png",
        "lost+found/0.png", ".git/0.png", "System Volume Information/0.png", "cats/a/.b/c/0.png",
    ],
)  # fmt: skip
def test_hidden_and_system_folders_are_neither_images_nor_classes(pets, caplog, junk):
    save(pets / junk)
    folder = Folder(str(pets))
    assert keys(folder, pets) == ALL and folder.names == ("cats", "dogs")
    assert "left out: hidden or system folders: 1 (" in caplog.text


def test_resource_forks_and_ds_store_are_not_read(pets, caplog):
    for name in ("cats/._0.png", "._cats", ".DS_Store", "cats/.DS_Store"):
        (pets / name).write_bytes(b"\0\5\26\7" + bytes(100))
    assert keys(Folder(str(pets)), pets) == ALL and not caplog.text


def test_linked_folders_are_followed(pets, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "x" / "7.png", 7)
    (pets / "cats" / "more").symlink_to(elsewhere)
    (pets / "birds").symlink_to(elsewhere / "x")
    (pets / "dogs" / "2.png").symlink_to(elsewhere / "x" / "7.png")
    folder = Folder(str(pets))
    assert keys(folder, pets) == [
        "birds/7.png",
        "cats/0.png",
        "cats/1.png",
        "cats/more/x/7.png",
        *ALL[2:],
        "dogs/2.png",
    ]
    assert folder.read(np.arange(7)).labels.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert shades(folder) == [7, 0, 1, 7, 2, 3, 7]


@pytest.mark.parametrize("link", ["cats/up", "cats/deep/up", "self"])
@pytest.mark.parametrize("target", [".", "cats/.."])
def test_loops_end_and_are_named(pets, caplog, link, target):
    (pets / link).parent.mkdir(exist_ok=True)
    (pets / link).symlink_to(pets / target)
    folder = Folder(str(pets))
    assert keys(folder, pets) == ALL and folder.names == ("cats", "dogs")
    assert f"links to a folder around them: 1 ({pets}/{link})" in caplog.text


def test_many_links_to_one_folder_are_read_once(tmp_path, caplog):
    """Lists 20 folders that each link twice to the next, which makes 2^20 paths."""
    for i in range(20):
        save(tmp_path / "far" / str(i) / "0.png")
        for name in "ab":
            (tmp_path / "far" / str(i) / name).symlink_to(tmp_path / "far" / str((i + 1) % 20))
    (tmp_path / "set" / "cats").mkdir(parents=True)
    (tmp_path / "set" / "cats" / "all").symlink_to(tmp_path / "far" / "0")
    assert len(Folder(str(tmp_path / "set"))) == 20
    assert "links to a folder that is read already: 21 (" in caplog.text


def test_a_folder_inside_keeps_its_own_path_beside_a_link_to_it(pets):
    save(pets / "cats" / "z" / "9.png")
    (pets / "cats" / "a").symlink_to("z")
    assert keys(Folder(str(pets)), pets)[:3] == [*ALL[:2], "cats/z/9.png"]


def test_links_that_lead_nowhere_are_named(pets, caplog):
    (pets / "cats" / "9.png").symlink_to("nowhere/x.png")
    (pets / "birds").symlink_to("nowhere")
    (pets / "dogs" / "loop.png").symlink_to("loop.png")
    assert keys(Folder(str(pets)), pets) == ALL
    assert f"links that lead nowhere: 3 ({pets}/birds, {pets}/cats/9.png, ...)" in caplog.text


def test_a_pipe_is_not_read(pets, caplog):
    os.mkfifo(pets / "cats" / "2.png")
    assert keys(Folder(str(pets)), pets) == ALL
    assert f"pipes, sockets or devices: 1 ({pets}/cats/2.png)" in caplog.text


@pytest.mark.parametrize(
    "suffix", ["bmp", "gif", "tif", "tiff", "jfif", "jpe", "apng", "avif", "ppm", "JPEG", "Png", "TIF"]
)
def test_what_pillow_reads_is_read(tmp_path, suffix):
    save(tmp_path / "0.png", 30)
    try:
        save(tmp_path / f"1.{suffix}", 200)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"this Pillow does not write {suffix}")
    folder = Folder(str(tmp_path))
    assert keys(folder, tmp_path) == ["0.png", f"1.{suffix}"]
    np.testing.assert_allclose(shades(folder), [30, 200], atol=2)


def test_other_files_are_counted_by_suffix(pets, caplog):
    for name in ("cats/2.heic", "cats/3.HEIC", "cats/4.heic", "dogs/2.svg", "notes", "cats/0.txt"):
        (pets / name).write_text("x")
    assert keys(Folder(str(pets)), pets) == ALL
    (line,) = [record.getMessage() for record in caplog.records]
    assert f".heic: 3 ({pets}/cats/2.heic, {pets}/cats/3.HEIC, ...), " in line
    assert f".svg: 1 ({pets}/dogs/2.svg)" in line and f"no suffix: 1 ({pets}/notes)" in line and ".txt" not in line


def test_a_folder_of_other_files_alone_is_refused_with_their_suffixes(tmp_path):
    (tmp_path / "0.heic").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no image: .* left out: \.heic: 1 \(.*0\.heic\)"):
        Folder(str(tmp_path))


@pytest.mark.parametrize("name", ["a\nb.png", "c d%20.png", "\U0001f600.png", "a\u2028b.png", "v1.0.png", "[x]*?.png"])
def test_odd_names_are_read_and_shown_in_one_line(tmp_path, name):
    save(tmp_path / "cats, big" / name, 5)
    folder = Folder(str(tmp_path))
    assert shades(folder) == [5] and folder.names == ("cats, big",)
    assert len(folder.name(0).splitlines()) == 1


def test_names_that_are_not_utf_8(tmp_path):
    os.makedirs(tmp_path / "cats")
    save(os.fsencode(tmp_path / "cats") + b"/\xfe.png", 5)
    folder = Folder(str(tmp_path))
    assert shades(folder) == [5] and folder.name(0) == f"{tmp_path}/cats/\\xfe.png"
    save(os.fsencode(tmp_path) + b"/bad\xff/0.png")
    with pytest.raises(ConfigError, match=r"the class 'bad\\xff' has .* a byte that is not UTF-8 in its name: rename"):
        Folder(str(tmp_path))


def test_a_class_with_a_line_break_is_refused(pets):
    save(pets / "a\nb" / "0.png")
    with pytest.raises(ConfigError, match=r"the class 'a\\nb' has a line break") as caught:
        Folder(str(pets))
    assert "\n" not in str(caught.value)


def test_a_folder_to_be_evaluated_follows_the_same_rules(pets):
    save(pets / "cats" / ".thumbnails" / "0.png")
    c = config_lib.base()
    c.data.image_size, c.evaluate.images = 4, str(pets)
    assert images.open_images(c).n == 4
