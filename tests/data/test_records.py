"""Tests of source arrayrecord: prepared records are read unchanged, or an error is raised."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from madformer_jax.data import pipeline, records
from madformer_jax.errors import ConfigError
from madformer_jax.modes import prepare
from madformer_jax.runtime import storage
from tests.data.prepared import ENCODER, GOOD, flip, ids, make_config, prepared, vae


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def test_records_are_shuffled_flipped_and_resumed_like_any_source(config, out):
    prepare.run(config, out)
    c = prepared(config, out)
    c.data.flip = True
    iterator = pipeline.train_iterator(c, batch=7)
    first = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    wanted = next(iterator)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["image"], wanted["image"])
    iterator.close()
    images = np.concatenate([batch["image"] for batch in first])
    assert sorted(images[:, 0, 0, 0]) == sorted(GOOD)
    flipped = images[:, 0, 0, 2] > images[:, 0, -1, 2]
    assert 3 < flipped.sum() < 18


def test_records_keep_their_split(config, out):
    config.data.split, config.data.test_share = "train", 0.3
    prepare.run(config, out)
    assert 5 < len(set(ids(config, out))) < 21
    c = prepared(config, out)
    c.data.split = "test"
    with pytest.raises(ConfigError, match="was prepared from split 'train', not 'test': set config.data.split=train"):
        pipeline.dataset_info(c)


def test_training_refuses_records_that_do_not_fit_its_config(config, out):
    prepare.run(config, out)
    c = prepared(config, out)
    c.data.image_size = 32
    with pytest.raises(ConfigError, match="data.image_size=32, but .* were prepared with 16"):
        pipeline.dataset_info(c)


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_damaged_shards_are_detected_and_made_again(config, out, monkeypatch, small):
    """Checks small sets by checksum when they are opened, and large ones when a record is read."""
    monkeypatch.setattr(records, "_MAX_CHECKSUM_BYTES", 1 << 28 if small else 0)
    prepare.run(config, out)
    first, third = (os.path.join(out, f"shard-0000{k}-of-00005.arrayrecord") for k in (1, 3))
    flip(first, 30_000 if small else 300)  # padding, or a record
    with pytest.raises(ConfigError, match="00001-of-00005.arrayrecord is damaged" + ("" if small else " at record")):
        ids(config, out)
    os.truncate(third, 100)
    os.remove(first)
    with pytest.raises(ConfigError, match="00001-of-00005.arrayrecord is missing or not .* bytes long"):
        pipeline.dataset_info(prepared(config, out))
    before = {file: os.stat(os.path.join(out, file)).st_ino for file in os.listdir(out)}
    assert prepare.run(config, out)["made"] == 2
    assert ids(config, out) == GOOD
    made = [file for file in before if os.stat(os.path.join(out, file)).st_ino != before[file]]
    assert [file for file in made if file.endswith("record")] == [os.path.basename(third)]


@pytest.mark.parametrize("slow", [False, True])
def test_a_flipped_byte_of_a_shard_never_changes_a_record(config, out, monkeypatch, slow):
    """Reads the original records or raises an error, without a checksum of the shard."""
    monkeypatch.setattr(records, "_MAX_CHECKSUM_BYTES", 0)
    config.prepare.shard = 23
    prepare.run(config, out)
    shard = os.path.join(out, "shard-00000-of-00001.arrayrecord")
    wanted = records.Records(out).read(np.arange(21)).arrays["image"]
    positions = [*range(0, 5000, 61), *range(65530, 66000, 13)]  # the records, and the index at the end
    detected = 0
    for position in positions:
        flip(shard, position)
        source = records.Records(out)
        source._readers._slow = slow
        try:
            np.testing.assert_array_equal(source.read(np.arange(21)).arrays["image"], wanted)
        except ConfigError:
            detected += 1
        flip(shard, position)
    assert detected > 0.7 * len(positions)  # the others are padding


def test_a_flipped_byte_of_any_json_file_is_detected(config, out):
    config.prepare.shard = 23
    prepare.run(config, out)
    refused = {
        "manifest.json": lambda: pipeline.dataset_info(prepared(config, out)),
        "plan.json": lambda: prepare.run(config, out),
        "shard-00000-of-00001.arrayrecord.json": lambda: records.read_sealed(path),
    }
    for name, use in refused.items():
        path = os.path.join(out, name)
        with open(path, "rb") as file:
            content = file.read()
        for position in range(0, len(content), 37):
            flip(path, position)
            if not content[position : position + 1].isspace():  # JSON allows any white space
                with pytest.raises(ConfigError):
                    use()
            flip(path, position)
    flip(path, content.index(b'"records": 21') + 11)
    figures = prepare.run(config, out)
    assert figures["made"] == 1 and len(ids(config, out)) == 21


def test_more_shards_than_may_be_open_are_read(config, out, monkeypatch):
    prepare.run(config, out)
    monkeypatch.setattr(records, "MAX_OPEN", 2)
    order = np.random.default_rng(0).permutation(21)
    batch = records.Records(out).read(order)
    assert (batch.arrays["image"][:, 0, 0, 0] == np.array(GOOD)[order]).all()
    assert (batch.labels == np.array(GOOD)[order] % 2).all()


def test_shards_on_slow_storage_are_read_at_the_same_time(config, out, monkeypatch):
    """Two threads read different shards at the same time once the first batch was slow."""
    prepare.run(config, out)
    both, real = threading.Barrier(2, timeout=20), records.ArrayRecordReader

    class Slow:
        def __init__(self, *args, **kwargs):
            self.reader = real(*args, **kwargs)
            self.seek = self.reader.seek

        def read(self, positions=None):
            if positions is None:
                return self.reader.read()
            both.wait()  # passes only if the other thread is reading too
            return self.reader.read(positions)

    monkeypatch.setattr(records, "ArrayRecordReader", Slow)
    monkeypatch.setattr(records, "SLOW_SECONDS_PER_RECORD", -1.0)
    source = records.Records(out)
    wanted = source.read(np.arange(21)).arrays["image"]
    rows = np.array([3, 0, 2]), np.array([7, 5, 6])  # of the first and of the second shard
    with ThreadPoolExecutor(2) as threads:
        for numbers, batch in zip(rows, threads.map(source.read, rows)):
            np.testing.assert_array_equal(batch.arrays["image"], wanted[numbers])


def test_an_unfinished_or_foreign_folder_is_refused(config, out, tmp_path):
    c = prepared(config, out)
    c.data.path = str(tmp_path)
    with pytest.raises(ConfigError, match="holds no manifest.json: make the records with --mode=prepare"):
        pipeline.dataset_info(c)
    records.write_sealed(tmp_path / "manifest.json", {"format": 1})
    with pytest.raises(ConfigError, match="is of format 1, not 2: prepare the data again.$"):
        pipeline.dataset_info(c)
    for content in ('{"format"', "[1]", '{"format": 2}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match="manifest.json is damaged"):
            pipeline.dataset_info(c)


def test_the_fingerprint_outlives_a_shard_made_again_but_not_other_data(config, out, tmp_path):
    config.prepare.kind = "latents"
    prepare.run(config, out, encoder=ENCODER)
    before = pipeline.dataset_info(prepared(config, out))
    os.remove(os.path.join(out, "shard-00001-of-00005.arrayrecord"))
    prepare.run(
        config, out, encoder=ENCODER._replace(encode=lambda x: vae(1.01 * x))
    )  # another machine rounds otherwise
    assert pipeline.dataset_info(prepared(config, out)) == before and before.names == ("0", "1")
    config.data.crop = False
    prepare.run(config, str(tmp_path / "other"), encoder=ENCODER)
    assert pipeline.dataset_info(prepared(config, str(tmp_path / "other"))).fingerprint != before.fingerprint


# ---- buckets, simulated by a folder (tests.support.cloud has a real one)


@pytest.fixture
def bucket(config, out, tmp_path, monkeypatch):
    prepare.run(config, out)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "is_remote", lambda path: str(path).startswith(out))
    return out


def test_shards_of_a_bucket_are_copied_once(config, bucket, tmp_path, caplog):
    with caplog.at_level("INFO", logger="absl"):
        assert ids(config, bucket) == GOOD == ids(config, bucket)
    assert len([line for line in caplog.messages if line.startswith("copying 5 shards")]) == 1
    (local,) = (tmp_path / "cache" / "madformer_jax" / "records").iterdir()
    os.truncate(local / "shard-00002-of-00005.arrayrecord", 10)  # as a full disk would leave it
    assert ids(config, bucket) == GOOD
    flip(str(local / "shard-00002-of-00005.arrayrecord"), 300)
    with pytest.raises(
        ConfigError, match="records/.*00002-of-00005.arrayrecord is damaged: remove the file, and it is copied"
    ):
        ids(config, bucket)


def test_shards_of_a_bucket_are_copied_at_once(config, bucket, monkeypatch):
    real, all_five = records._copy_shard, threading.Barrier(5)

    def copy(*args):
        all_five.wait(10)  # passes only if the other copies have started too
        real(*args)

    monkeypatch.setattr(records, "_copy_shard", copy)
    assert ids(config, bucket) == GOOD


def test_damaged_shards_of_a_bucket_are_not_used(config, bucket):
    flip(os.path.join(bucket, "shard-00003-of-00005.arrayrecord"), 300)
    with pytest.raises(ConfigError, match=f"{bucket}/shard-00003-of-00005.arrayrecord is damaged: run --mode=prepare"):
        ids(config, bucket)


def test_a_small_disk_is_reported_before_anything_is_copied(config, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match="its shards need 0.0 GB in .*, where 0.0 GB are free: let XDG_CACHE_HOME"):
        ids(config, bucket)
    assert not list((tmp_path / "cache").rglob("*.arrayrecord"))
