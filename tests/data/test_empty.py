"""Tests of reading 0 records from every source and every set of images.

This happens when a process has no share of a shard.
"""

import dataclasses

import jax
import numpy as np
import pytest

from madformer_jax.data import digits, folder, sources, tars, tfds
from madformer_jax.data.drawings import pictures
from madformer_jax.data.source import Subset
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images, shards
from madformer_jax.evaluation.networks import registry
from madformer_jax.modes import prepare
from tests import tiny
from tests.data import prepared
from tests.data.test_tars import image, write_tar


def _folder(path):
    for i in range(4):
        (path / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        (path / f"class{i % 2}" / f"{i}.png").write_bytes(image(i, "PNG"))
    return path


def _drawings(monkeypatch):
    png, rows = np.frombuffer(image(5, "PNG"), np.uint8), np.zeros((1, len(pictures.Drawings.attributes)), np.int32)
    monkeypatch.setattr(pictures, "_caption", lambda number, row: "a word")
    monkeypatch.setattr(
        pictures, "_load_pictures", lambda *args: [pictures._CacheFile(png, np.array([len(png)]), rows)]
    )
    return pictures.Drawings(1, 32)


def _records(path, kind):
    c = prepared.make_config(path)
    c.prepare.kind = kind
    if kind == "latents":
        c.codec.name = "vae"
    prepare.run(c, str(path / "out"), **({"encoder": prepared.ENCODER} if kind == "latents" else {}))
    return sources.open_source(prepared.prepared(c, str(path / "out")))


def _tfds():
    source = object.__new__(tfds.Tfds)
    row = {"image": image(1, "PNG"), "label": 2, "caption": b"a word"}
    source._rows, source.classes, source._image, source._caption = [row], 3, "image", "caption"
    source._name, source._split = "made_up", "train"
    return source


def _source(kind, path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
    if kind == "subset":
        return Subset(folder.Folder(str(_folder(path))), np.array([2, 0]))
    makers = {
        "digits": digits.Digits,
        "folder": lambda: folder.Folder(str(_folder(path))),
        "webdataset": lambda: tars.Tars(
            write_tar(path / "a.tar", {"0.png": image(1), "0.cls": b"3", "0.txt": b"a word"})
        ),
        "drawings": lambda: _drawings(monkeypatch),
        "images": lambda: _records(path, "images"),
        "latents": lambda: _records(path, "latents"),
        "tfds": _tfds,
    }
    return makers[kind]()


@pytest.mark.parametrize("kind", ["digits", "folder", "subset", "webdataset", "drawings", "images", "latents", "tfds"])
def test_reading_no_records_returns_arrays_of_the_usual_shape(tmp_path, monkeypatch, kind):
    source = _source(kind, tmp_path, monkeypatch)
    empty = source.read(np.zeros(0, np.int64))
    if kind in ("images", "latents"):
        assert not source._readers._slow  # the time of an empty batch says nothing about the storage
    single = source.read(np.array([0]))
    assert empty.arrays.keys() == single.arrays.keys()
    for name, array in single.arrays.items():
        assert len(empty.arrays[name]) == 0
        if isinstance(array, np.ndarray):
            assert (empty.arrays[name].shape[1:], empty.arrays[name].dtype) == (array.shape[1:], array.dtype)
    assert empty.captions == source.captions(np.zeros(0, np.int64)) == []
    assert empty.labels.shape == (0,) and empty.labels.dtype == single.labels.dtype == np.int32
    if single.attributes is not None:
        assert empty.attributes.shape == (0, single.attributes.shape[1])
        assert empty.attributes.dtype == single.attributes.dtype == np.int32
    if kind != "latents":  # evaluation does not read latents
        first = images._hash_records(source, np.arange(1))
        assert images._hash_records(source, np.arange(1)) == first != images._hash_records(source, np.zeros(0, int))
        relabeled = dataclasses.replace(single, labels=single.labels + 1)
        monkeypatch.setattr(source, "read", lambda indices: relabeled, raising=False)
        assert images._hash_records(source, np.arange(1)) != first


@pytest.mark.parametrize("kind", ["npz", "npz files", "folder", "data:all", "blurred"])
def test_a_process_without_a_share_of_a_shard_adds_no_row(tmp_path, monkeypatch, kind):
    """Arrays of the first of four processes, for a shard of one image, fit those of the others."""
    c = tiny.get_config("plain")
    c.evaluate.images = str(tmp_path / "x")
    pixels = np.zeros((4, 32, 32, 1), np.uint8)
    if kind == "npz":
        np.savez(tmp_path / "x.npz", arr_0=pixels)
        c.evaluate.images = str(tmp_path / "x.npz")
    elif kind == "npz files":
        (tmp_path / "x").mkdir()
        for i in range(2):
            np.savez(tmp_path / "x" / f"{i}.npz", images=pixels)
    elif kind == "data:all":
        c.evaluate.images = kind
    else:
        _folder(tmp_path / "x")
        c.evaluate.degrade = "blur:1" if kind == "blurred" else ""
    data = images.open_images(c)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(shards, "allgather_rows", lambda arrays: arrays)

    def extract(x):
        return registry.NetworkOutputs(np.zeros((len(x), 5), np.float32), None)

    (found,) = images.extract_missing_shards(data, extract, images.UnreadableImages(4, 0.0), [shards.Shard(0, 1)])
    assert {name: x.shape for name, x in found.items()} == {
        "features": (0, 5), "profile": (0, 62), "labels": (0,), shards.UNREADABLE_KEY: (0,),
    }  # fmt: skip


def test_all_processes_raise_the_error_of_one(monkeypatch):
    theirs = {"errors": np.frombuffer(b"shard 3 is damaged.\n", np.uint8)}
    monkeypatch.setattr(shards, "allgather_rows", lambda arrays: theirs)
    with pytest.raises(ConfigError, match="^shard 3 is damaged.$"):
        shards.sync_errors(4)
    monkeypatch.undo()
    assert shards.sync_errors(4) == 4
    with pytest.raises(ConfigError, match="^here$"):
        shards.sync_errors(ConfigError("here"))
