"""Tests of source `drawings`: pictures, their attributes and captions, splits and the cache."""

import hashlib
import importlib.metadata
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from madformer_jax.config import schema as config_lib
from madformer_jax.data import pipeline, preprocess, sources
from madformer_jax.data.drawings import attributes, captions, pictures
from madformer_jax.errors import ConfigError
from madformer_jax.modes import prepare
from madformer_jax.sampling import prompts
from tests.data.prepared import prepared

# SHA-256 with dicebear-core 10.7.0, dicebear-styles 10.6.0 and resvg-py 0.5.0.
FIRST_HUNDRED = "e445ff91f09f1d8bbdae6413dbb6cf6f150e2aba65ebc8a194b667f00279e2b8"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Uses an empty cache with 5 pictures per file, which this process draws."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pictures, "_PICTURES_PER_FILE", 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    pictures._load_pictures.cache_clear()
    yield tmp_path / "cache" / "madformer_jax" / "drawings"
    pictures._load_pictures.cache_clear()


def make_config(split="train", count=5, size=32):
    c = config_lib.base()
    c.data.source, c.data.split, c.data.drawings, c.data.image_size = "drawings", split, count, size
    return c


def pixels(number: int, size: int) -> np.ndarray:
    return preprocess.Preprocessor(size, 3, crop=True).process(pictures.draw(0, number, size).png)


def test_the_first_hundred_are_the_same_on_every_machine():
    digest = hashlib.sha256(b"".join(pixels(number, 64).tobytes() for number in range(100)))
    assert digest.hexdigest() == FIRST_HUNDRED


def test_every_size_shows_the_same_pictures():
    """Compares pictures after averaging the larger one. The limit is in units of 1/255."""
    for number in range(10):
        at = {size: pixels(number, size).astype(np.float32) for size in (32, 64, 128, 256)}
        for small, large in itertools.combinations(at, 2):
            k = large // small
            averaged = at[large].reshape(small, k, small, k, 3).mean((1, 3))
            assert np.abs(averaged - at[small]).mean() < 1.5, (number, small, large)
        assert at[64].std() > 10


def test_pictures_of_other_seeds_and_numbers_differ():
    assert len({pictures.draw(*at, 16).png for at in [(0, 0), (1, 0), (0, 5), (0, 50)]}) == 4


def test_all_styles_are_dedicated_to_the_public_domain():
    assert {pictures._load_style(name).meta().license().name() for name in pictures.STYLES} == {"CC0 1.0"}


# ---- attributes and captions


def test_attributes_are_what_dicebear_drew():
    """Compares the attributes with the options of the picture that have names."""
    from dicebear import Avatar

    for number in range(60):
        style = pictures.STYLES[number % 5]
        options = Avatar(pictures._load_style(style), {"seed": f"0/{number}"}).to_json()["options"]
        words = pictures.draw(0, number, 16).words
        assert attributes.from_indices(attributes.to_indices(words)) == words
        for name, origin in attributes.STYLES[style].items():
            if isinstance(origin, attributes.Words):
                assert words.get(name) == origin.words.get(options.get(origin.option))
        assert words["background"] == attributes.nearest_color_name(options["backgroundColor"][0])
    assert words.keys() <= {name for name, _ in attributes.ATTRIBUTES}


def test_every_variant_and_color_of_the_styles_has_a_name():
    for style, named in attributes.STYLES.items():
        components, colors = pictures._load_style(style).components(), pictures._load_style(style).colors()
        for origin in named.values():
            if isinstance(origin, attributes.Words):
                variants = components[origin.option.removesuffix("Variant")].variants()
                assert origin.words.keys() == variants.keys()
            else:
                options = {origin.colour, *origin.others.values()} - {None}
                assert {option.removesuffix("Color") for option in options} <= colors.keys()
    for color, name in {"#ff0000": "red", "#1d4ed8": "blue", "#ffffff": "white", "#3cc0b0": "turquoise"}.items():
        assert attributes.nearest_color_name(color) == name


def test_captions_mention_all_visible_attributes_and_no_others():
    """Checks that each value but "none" is in the sentence, except invisible ones."""
    for number in range(100):
        words = pictures.draw(0, number, 16).words
        texts = [captions.caption(pictures.STYLES[number % 5], words, k) for k in range(captions.PHRASINGS)]
        assert len(set(texts)) == captions.PHRASINGS
        invisible = {"beard", "cheeks"} if number % 5 == 4 else set()
        invisible |= {"eyes"} if words.get("glasses") == "sunglasses" else set()
        assert captions.unmentioned(words) == invisible & words.keys()
        for text, (name, value) in itertools.product(texts, words.items()):
            is_mentioned = all(word in text for word in value.split())
            assert is_mentioned == (name not in invisible), (text, name, value)
        assert "none" not in texts[0]


def test_a_caption_in_each_phrasing():
    words = {"colour": "purple", "body": "slug", "top": "horns", "eyes": "googly eyes", "mouth": "open mouth"}
    words["background"] = "pale yellow"
    monster = "a purple clay monster shaped like a slug"
    details = "with horns, googly eyes and an open mouth"
    assert [captions.caption("clay", words, k) for k in range(3)] == [
        f"{monster} {details}, on pale yellow",
        f"on pale yellow, {monster} {details}",
        f"{monster} on pale yellow, {details}",
    ]
    words = {"colour": "orange", "background": "dark blue"}
    assert captions.caption("planets", words, 2) == "an orange planet in a dark blue sky"
    words |= {"skin": "tan", "outfit": "hoodie", "top": "short hair", "top colour": "brown", "eyes": "soft eyes"}
    words |= {"glasses": "sunglasses", "beard": "goatee", "cheeks": "freckles"}
    expected = "a blocky person with tan skin in an orange hoodie with short brown hair and sunglasses, on dark blue"
    assert captions.caption("voxel-art", words, 0) == expected


# ---- splits


def test_splits_are_disjoint_and_combinations_held_out():
    c = make_config("all", count=60, size=16)
    c.data.test_share = 0.2
    whole = sources.open_source(c)
    numbers, pairs = {}, {}
    for c.data.split in ("train", "test", "composition"):
        subset = sources.open_source(c)
        numbers[c.data.split] = {int(subset.name(i).split("/")[-1]) for i in range(len(subset))}
        examples = subset.read(np.arange(len(subset)))
        words = [attributes.from_indices(row) for row in examples.attributes]
        names = [subset.names[label] for label in examples.labels]
        pairs[c.data.split] = {
            (k, *(w.get(name) for name in pictures.COMPOSITION_PAIRS[k])) for k, w in zip(names, words)
        }
        for k, w in zip(names, words):  # the pair alone decides
            pair = {name: w[name] for name in pictures.COMPOSITION_PAIRS[k] if name in w}
            assert pictures.is_composition(k, pair) == (c.data.split == "composition")
        assert subset.attributes == whole.attributes == attributes.ATTRIBUTES
    assert sorted(itertools.chain(*numbers.values())) == list(range(60)) and all(numbers.values())
    assert not pairs["composition"] & (pairs["train"] | pairs["test"])
    assert len(numbers["test"]) < 25 and len(numbers["composition"]) < 15
    for c.data.split in ("test", "composition"):
        with pytest.raises(ConfigError, match=f"split='{c.data.split}' is held out"):
            pipeline.train_iterator(c, batch=2)


def test_more_pictures_leave_the_others_in_their_split():
    few, many = (pictures.Drawings(n, 16).split_indices(0.2) for n in (10, 20))
    np.testing.assert_array_equal(few, many[:10])


# ---- the cache


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux has pipes that separate writes")
def test_processes_that_share_a_pipe_write_whole_lines(tmp_path):
    """Checks that a line is a single write even if Python does not buffer."""
    output, child_output = os.pipe2(os.O_DIRECT)  # each read returns a single write
    command = [sys.executable, "-m", pictures.__name__, str(tmp_path), "0", "16", "1", "0"]
    subprocess.run(command, stdout=child_output, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=True)
    assert os.read(output, 100) == b"0\n"
    os.close(output)
    os.close(child_output)


def test_pictures_are_read_as_they_are_drawn():
    source = sources.open_source(make_config("all", count=8))
    examples = pickle.loads(pickle.dumps(source)).read(np.array([7, 2, 5]))
    table = preprocess.Preprocessor(32, 3, crop=True)
    np.testing.assert_array_equal(
        table.process_batch(examples.arrays["image"]), [pixels(number, 32) for number in (7, 2, 5)]
    )
    assert examples.labels.tolist() == [2, 2, 0] and len(source) == 8 and source.names == pictures.STYLES
    words = [pictures.draw(0, number, 16).words for number in (7, 2, 5)]
    assert [attributes.from_indices(row) for row in examples.attributes] == words
    assert examples.captions == [captions.caption(pictures.STYLES[k % 5], w, k // 5) for k, w in zip((7, 2, 5), words)]


def test_several_processes_draw_what_is_missing_and_damaged(cache, caplog, monkeypatch):
    wanted = pictures.Drawings(20, 16).read(np.arange(20))
    files = sorted(cache.glob("*/*.npz"))
    undamaged = [files[k].stat().st_ino for k in (0, 3)]
    with open(files[1], "r+b") as file:
        file.seek(500)
        file.write(b"damage")
    os.truncate(files[2], 100)
    pictures._load_pictures.cache_clear()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    examples = pictures.Drawings(20, 16).read(np.arange(20))
    assert examples.arrays == wanted.arrays and examples.captions == wanted.captions
    assert caplog.text.count("is damaged") == 2
    assert sorted(cache.glob("*/*")) == sorted([*files, files[0].with_name("lock")])  # no temporary file
    assert [files[k].stat().st_ino for k in (0, 3)] == undamaged


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cache_that_cannot_be_written_is_an_error_in_one_line(cache, processes, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    folder = cache / f"{pictures.cache_key(0)[:16]}-16"
    (folder / "00000000.npz" / "in its way").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match="cannot store its pictures in .*: (Is a directory|Directory not empty)"
    ) as caught:
        pictures.Drawings(10, 16)
    assert "\n" not in str(caught.value)


# ---- prepared


def test_prepared_drawings_keep_attributes_and_captions(tmp_path):
    c = make_config("all", count=5, size=16)
    c.model.blocks = c.model.unet_stride = 1
    c.prepare.shard, c.prepare.flip = 3, True
    prepare.run(c, str(tmp_path / "out"))
    source, original = sources.open_source(prepared(c, str(tmp_path / "out"))), sources.open_source(c)
    assert source.attributes == original.attributes and source.names == original.names
    numbers = np.arange(5).repeat(2)
    records, wanted = source.read(np.arange(10)), original.read(numbers)
    np.testing.assert_array_equal(records.attributes, wanted.attributes)
    assert records.captions == wanted.captions and records.labels.tolist() == numbers.tolist()
    np.testing.assert_array_equal(records.arrays["image"][4], pixels(2, 16))


# ---- errors


def test_wrong_settings_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="split='tset' is unknown: one of train, test, composition, all"):
        sources.open_source(make_config("tset"))
    with pytest.raises(ConfigError, match="image_size=8 is too small for drawings: at least 16"):
        sources.open_source(make_config(size=8))
    with pytest.raises(ConfigError, match="split='composition' is empty"):
        sources.open_source(make_config("composition", count=1))
    monkeypatch.setitem(attributes.STYLES["clay"], "body", attributes.Words("bodyVariant", {}))
    with pytest.raises(ConfigError, match="draw 'squat' in clay, which is unknown: install"):
        pictures.draw(0, 0, 16)


def test_a_missing_package_is_named(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    pictures._package_versions.cache_clear()
    with pytest.raises(ConfigError, match="needs a package: pip install dicebear-core"):
        sources.open_source(make_config())


def test_prompts_from_the_data_request_the_attributes_of_their_captions():
    c = make_config("all", count=10)
    c.text.tokenizer, c.text.vocabulary, c.text.length = "drawings", 835, 44
    c.sample.prompts, c.sample.n = "data:all", 13
    source = sources.open_source(c)
    examples = source.read(np.arange(10))
    numbers = np.arange(13) % 10
    assert prompts.load(c) == [examples.captions[i] for i in numbers]
    np.testing.assert_array_equal(
        prompts.requested_attributes(c), pictures.captioned_attributes(examples.attributes)[numbers]
    )
    np.testing.assert_array_equal(
        source.captioned_attributes(np.arange(10)), pictures.captioned_attributes(examples.attributes)
    )
    c.text.caption = "class"
    assert prompts.requested_attributes(c) is None
    c.text.caption, c.sample.prompts = "caption", "a red planet"
    assert prompts.requested_attributes(c) is None


def test_eyes_behind_sunglasses_are_not_requested():
    words = {"eyes": "round eyes", "glasses": "sunglasses", "colour": "red"}
    rows = np.stack([attributes.to_indices(words), attributes.to_indices(words | {"glasses": "visor"})])
    sunglasses, visor = (attributes.from_indices(row) for row in pictures.captioned_attributes(rows))
    assert sunglasses == {"glasses": "sunglasses", "colour": "red"} and visor == words | {"glasses": "visor"}
