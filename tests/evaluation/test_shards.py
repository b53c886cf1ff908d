"""Shards on disk, and the slices of the processes."""

import jax
import numpy as np
import pytest
from etils import epath

from madformer_jax.config import schema
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import shards
from madformer_jax.evaluation.networks.registry import NetworkOutputs


def test_existing_shards_are_not_missing_and_are_read_in_order(tmp_path):
    collected = shards.Shards(epath.Path(tmp_path / "x"), n=7, size=3)
    assert collected.missing() == [(0, 3), (3, 6), (6, 7)]
    for shard in reversed(collected.missing()):
        collected.write(shard, {"number": np.arange(*shard)})
    assert collected.missing() == []
    np.testing.assert_array_equal(collected.read()["number"], np.arange(7))
    (broken,) = (tmp_path / "x").glob("part_0000003*")
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ConfigError, match="part_0000003_0000006.npz is damaged"):
        collected.read()
    assert collected.missing() == [(3, 6)]
    lacking = {"number": np.arange(2), shards.UNREADABLE_KEY: np.frombuffer(b"4.png (broken)\n", np.uint8)}
    collected.write(collected.missing()[0], lacking)
    assert collected.missing() == [(3, 6)]  # The image may have been repaired.
    collected.remove()
    assert not (tmp_path / "x").exists()


def test_process_slices_cover_all_images_once(monkeypatch):
    for n in (1, 3, 8):
        rows = []
        for index in range(4):
            monkeypatch.setattr(jax, "process_index", lambda i=index: i)
            monkeypatch.setattr(jax, "process_count", lambda: 4)
            rows += list(range(n))[shards.process_slice(n)]
        assert rows == list(range(n))


def test_zero_images_give_empty_arrays_of_the_usual_shapes():
    def extract(images):
        return NetworkOutputs(np.zeros((len(images), 5), np.float32), np.zeros((len(images), 3), np.float32))

    arrays = shards.extract_features(extract, np.zeros((0, 4, 6, 1), np.uint8), np.zeros(0, np.int32))
    assert {name: x.shape for name, x in arrays.items()} == {
        "features": (0, 5), "logits": (0, 3), "labels": (0,), "profile": (0, 3 + 5),
    }  # fmt: skip


def test_large_images_are_read_in_small_batches():
    c = schema.base()
    c.data.image_size = 1024
    assert shards.read_batch_size(c) == 21
    c.data.image_size = 32
    assert shards.read_batch_size(c) == 256


def test_prefetched_items_keep_their_order_and_errors():
    assert list(shards.prefetch(iter(range(5)))) == list(range(5))

    def broken():
        yield 1
        raise ConfigError("unreadable")

    with pytest.raises(ConfigError, match="unreadable"):
        list(shards.prefetch(broken()))
