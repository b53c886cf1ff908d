"""Source `hf`: folders of save_to_disk, parquet and Arrow files, read like any other source."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config import schema
from madformer_jax.data import hugging_face, pipeline, sources
from madformer_jax.errors import ConfigError

datasets = pytest.importorskip("datasets")
SHADES = np.arange(0, 240, 10)  # of the images, by row


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def rows(n: int = len(SHADES)) -> dict[str, list]:
    images = [encode(Image.new("RGB", (6, 5), (int(s),) * 3)) for s in SHADES[:n]]
    return {"image": images, "label": [i % 3 for i in range(n)], "text": [f"shade {i}" for i in range(n)]}


def make(content: dict[str, list], **features) -> "datasets.Dataset":
    """Returns a data set in memory. Columns have the types of `features`, or those that `datasets` infers."""
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])} | features
    table = datasets.Dataset.from_dict(content)
    return table.cast(datasets.Features({name: types.get(name, kind) for name, kind in table.features.items()}))


def config(path, split="train", **fields):
    c = schema.base()
    c.data.source, c.data.path, c.data.split = "hf", str(path), split
    c.data.image_size, c.data.test_share = 4, 0.0
    c.data.update(fields)
    return c


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(params=["save_to_disk", "dict", "parquet", "folder", "arrow"])
def stored(request, tmp_path):
    """A data set of the rows in each form that users have."""
    table, path = make(rows()), tmp_path / "set"
    if request.param == "save_to_disk":
        table.save_to_disk(path, num_shards=3)
    elif request.param == "dict":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    elif request.param == "parquet":
        path = tmp_path / "set.parquet"
        table.to_parquet(path)
    else:
        (path / "data").mkdir(parents=True)
        for i in range(2):
            part = table.select(range(12 * i, 12 * i + 12))
            if request.param == "folder":
                part.to_parquet(path / "data" / f"train-{i}.parquet")
            else:
                part.save_to_disk(tmp_path / str(i))
                (tmp_path / str(i) / "data-00000-of-00001.arrow").rename(path / "data" / f"{i}.arrow")
    return path


def shades(examples, c) -> list[int]:
    return pipeline.make_preprocessor(c).process_batch(examples.arrays["image"]).mean((1, 2, 3)).tolist()


def test_every_form_is_read_at_random_and_in_other_processes(stored):
    c = config(stored)
    source = pickle.loads(pickle.dumps(sources.open_source(c)))
    examples = source.read(np.array([23, 0, 7]))
    assert shades(examples, c) == [230, 0, 70]
    assert examples.labels.tolist() == [2, 0, 1] and examples.labels.dtype == np.int32
    assert examples.captions == ["shade 23", "shade 0", "shade 7"]
    assert source.captions(np.zeros(0, int)) == source.read(np.zeros(0, int)).captions == []
    assert len(source) == len(SHADES) and source.names == ("cat", "dog", "owl") and source.classes == 3
    assert source.name(7) == f"hf:{stored} train[7]"


def test_the_fingerprint_is_that_of_the_content_in_any_place_and_form(tmp_path):
    def fingerprint(table, name):
        table.save_to_disk(tmp_path / name)
        return sources.open_source(config(tmp_path / name)).fingerprint

    table = make(rows())
    table.to_parquet(tmp_path / "a.parquet")
    assert fingerprint(table, "a") == fingerprint(table, "b")
    assert sources.open_source(config(tmp_path / "a.parquet")).fingerprint == fingerprint(table, "c")
    others = [
        table.select(range(23)),
        make(rows() | {"label": [0] * 24}),
        make(rows() | {"image": rows()["image"][::-1]}),
    ]
    assert len({fingerprint(other, f"other {i}") for i, other in enumerate([table, *others])}) == 4


def test_workers_read_without_the_package(tmp_path):
    """The images are mapped, not copied, and neither `datasets` nor JAX is imported."""
    make(rows()).save_to_disk(tmp_path / "set")
    source = pickle.dumps(sources.open_source(config(tmp_path / "set")))
    assert len(source) < 3000
    code = (
        "import pickle, sys, numpy as np\n"
        "source = pickle.loads(sys.stdin.buffer.read())\n"
        "assert source.read(np.array([5])).captions == ['shade 5']\n"
        "import pyarrow\n"
        "assert pyarrow.total_allocated_bytes() < 2000, pyarrow.total_allocated_bytes()\n"
        "assert not {'datasets', 'jax', 'tensorflow'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=source, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_name_of_a_folder_is_not_a_pattern(tmp_path):
    for name, n in (("a[b]?", 5), ("a[b]c", 3), ("abc", 4)):
        (tmp_path / name).mkdir()
        make(rows(n)).to_parquet(tmp_path / name / "0.parquet")
    assert len(sources.open_source(config(tmp_path / "a[b]?"))) == 5


def test_a_split_of_the_set_is_read_as_it_is(tmp_path):
    table = make(rows())
    splits = {"train": table.select(range(10)), "validation": table.select([10]), "test": table.select(range(11, 24))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    for name, part in splits.items():
        part.to_parquet(tmp_path / "files" / name / "0.parquet")
    for path in (tmp_path / "set", tmp_path / "files"):
        sizes = [len(sources.open_source(config(path, name, test_share=0.5))) for name in splits]
        assert sizes == [10, 1, 13]
        with pytest.raises(ConfigError, match="has no split 'all', only test, train, validation"):
            sources.open_source(config(path, "all"))


def test_a_hash_of_its_number_holds_a_row_out_if_the_set_does_not(tmp_path):
    table = make(rows())
    datasets.DatasetDict({"train": table, "validation": table.select([3])}).save_to_disk(tmp_path / "set")
    parts = {s: sources.open_source(config(tmp_path / "set", s, test_share=0.3)) for s in ("train", "test", "all")}
    names = {split: [part.name(i) for i in range(len(part))] for split, part in parts.items()}
    assert sorted(names["train"] + names["test"]) == sorted(names["all"]) and len(names["all"]) == 24
    assert 2 <= len(names["test"]) <= 13  # 7.2 expected
    assert len(sources.open_source(config(tmp_path / "set", "validation"))) == 1
    table.select(range(12)).save_to_disk(tmp_path / "half")
    half = sources.open_source(config(tmp_path / "half", "test", test_share=0.3))
    kept = [name for name in names["test"] if int(name.split("[")[1][:-1]) < 12]
    assert [half.name(i).replace("half", "set") for i in range(len(half))] == kept
    with pytest.raises(ConfigError, match="no split 'tset', only train, validation; or train, test, all"):
        sources.open_source(config(tmp_path / "set", "tset"))
    with pytest.raises(ConfigError, match="'test' is held out"):
        pipeline.train_iterator(config(tmp_path / "set", "test"), batch=2)


def test_odd_images_follow_the_rules_of_other_sources(tmp_path):
    content = rows(8)
    content["image"][1] = encode(Image.new("RGBA", (6, 5), (0, 0, 0, 0)))
    content["image"][2] = encode(Image.new("CMYK", (6, 5)), "JPEG")
    content["image"][3] = b"no image"
    content["image"][4] = None
    make(content).save_to_disk(tmp_path / "set")
    c = config(tmp_path / "set", max_corrupt=0.25)
    table, source = pipeline.make_preprocessor(c), sources.open_source(c)
    for i in (1, 2):  # transparent on white; CMYK without ink
        assert table.process(source.read(np.array([i])).arrays["image"][0]).min() >= 254
    batches = pipeline.train_iterator(c, batch=8)
    assert next(batches)["image"].shape == (8, 4, 4, 3)
    c.data.max_corrupt = 0.2
    with pytest.raises(ConfigError, match=r"hf:.*train\[[34]\] cannot be read .*: 2 of 8 records"):
        next(pipeline.train_iterator(c, batch=8))


def test_an_image_may_lie_in_a_local_file_but_not_in_a_device(tmp_path):
    content = {"image": [{"bytes": None, "path": str(tmp_path / "0.png")}, {"bytes": None, "path": "/dev/zero"}]}
    (tmp_path / "0.png").write_bytes(rows(1)["image"][0])
    datasets.Dataset.from_dict(content).save_to_disk(tmp_path / "set")
    source = sources.open_source(config(tmp_path / "set"))
    assert source.read(np.array([0])).arrays["image"] == rows(1)["image"]
    with pytest.raises(FileNotFoundError):
        source.read(np.array([1]))


@pytest.mark.parametrize("kind", ["bytes", "dict"])
def test_parquet_of_other_tools_needs_no_types_of_the_package(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    content = rows(3)
    if kind == "dict":
        content["image"] = [{"bytes": image, "path": None} for image in content["image"]]
    content |= {"id": [5, 6, 7], "label": ["b", None, "a"]}
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "a.parquet")
    c = config(tmp_path / "a.parquet", max_corrupt=0.4)
    source = sources.open_source(c)
    examples = source.read(np.arange(2))
    assert source.names == ("a", "b") and examples.labels.tolist() == [1, 0] and shades(examples, c) == [0, 20]
    assert source.name(1).endswith("[2]") and examples.captions == ["shade 0", "shade 2"]
    c.data.max_corrupt = 0.3
    with pytest.raises(
        ConfigError,
        match=r"train\[1\] has no label: 1 of 3 images have no usable label, more than config.data.max_corrupt",
    ):
        sources.open_source(c)


def test_a_set_whose_labels_are_all_missing_is_unlabeled(tmp_path):
    make(rows(4) | {"label": [-1] * 4}).save_to_disk(tmp_path / "set")
    source = sources.open_source(config(tmp_path / "set"))
    assert source.classes == 0 and source.names == () and source.read(np.arange(4)).labels.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 5, 1], "int64", None),
        ([0, 2_000_000, 1], "int64", "a label is 2000000: classes count from 0 and are below 1000000"),
        ([0, 2**64 - 1, 1], "uint64", "labels are not classes"),
        ([b"a", b"\xff", b"b"], "string", "is not UTF-8 text"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, kind, message):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(labels, "binary" if kind == "string" else kind)
    if kind == "string":  # an invalid string, which Arrow does not check
        column = pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())
    table = pyarrow.table({"image": rows(3)["image"], "label": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    if message is None:
        assert sources.open_source(config(tmp_path / "a.parquet")).classes == 6
        return
    with pytest.raises(ConfigError, match=message) as caught:
        sources.open_source(config(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)


def test_columns_are_found_or_named(tmp_path):
    content = rows(4) | {"caption": ["a"] * 4, "thumb": rows(4)["image"][::-1], "coarse": [1] * 4, "id": [9] * 4}
    table = make(content, thumb=datasets.Image(), coarse=datasets.ClassLabel(num_classes=2))
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match="caption_column is empty, and .* has several: text, caption. Name one"):
        sources.open_source(config(tmp_path / "set"))
    c = config(tmp_path / "set", caption_column="caption")
    source = sources.open_source(c)  # "image" and "label" are usual names
    assert source.names == ("cat", "dog", "owl") and shades(source.read(np.array([3])), c) == [30]
    c.data.image_column, c.data.label_column = "thumb", "coarse"
    source = sources.open_source(c)
    assert source.names == ("0", "1") and shades(source.read(np.array([3])), c) == [0]
    assert source.read(np.array([0])).captions == ["a"]
    c.data.label_column = "id"
    assert sources.open_source(c).classes == 10
    table.rename_columns({"label": "fine", "text": "note"}).save_to_disk(tmp_path / "other")
    c = config(tmp_path / "other")
    with pytest.raises(ConfigError, match="label_column is empty, and .* has several: fine, coarse. Name one of them"):
        sources.open_source(c)
    for field, value, message in (
        ("image_column", "photo", "image_column='photo' does not exist in .*: its columns are image, fine, note"),
        ("image_column", "note", "image_column='note' has another type"),
        ("caption_column", "id", "caption_column='id' has another type"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources.open_source(config(tmp_path / "other", label_column="fine", **{field: value}))
    table.select_columns(["text"]).save_to_disk(tmp_path / "texts")
    with pytest.raises(ConfigError, match="has no column of images: its columns are text"):
        sources.open_source(config(tmp_path / "texts"))


def test_errors_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "set.py").write_text("raise SystemExit('code of the data set has run')")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nfor many reasons")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, real=datasets.load_dataset, **kwargs: (
        unreachable() if "/" in args[0] else real(*args, **kwargs)
    ))  # fmt: skip
    for name, message in (
        ("", "names no data set: give hf:<path or owner/name>"),
        ("hf:/no/where", "/no/where does not exist, and it is not a hub id"),
        ("hf:mnist", "mnist does not exist, and it is not a hub id"),
        ("hf:owner/name", "cannot be opened: Couldn't reach the Hub. Check the name and the network, or download it"),
        (tmp_path / "empty", "neither parquet nor Arrow files nor what save_to_disk writes"),
        (tmp_path / "set.py", "neither parquet nor Arrow files"),
        (tmp_path / "bad.parquet", "cannot be opened: "),
    ):
        c = config("" if str(name).startswith("hf:") else name)
        if str(name).startswith("hf:"):
            c.data.source = name
        with pytest.raises(ConfigError, match=message) as caught:
            sources.open_source(c)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets: pip install"):
        hugging_face._load(str(tmp_path), "")
