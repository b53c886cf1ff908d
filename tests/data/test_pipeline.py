"""Tests of the input pipeline: order, sharding, checkpoints, workers."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.data import pipeline, preprocess, sources, text
from madformer_jax.data.source import Examples, Source
from madformer_jax.errors import ConfigError


@pytest.fixture
def numbered(tmp_path):
    """Config of 23 gray images of different shades, brighter on the right; label = shade // 100."""
    for i in range(23):
        pixels = np.full((6, 6), 10 * i, np.uint8)
        pixels[:, 3:] += 5
        (tmp_path / str(i // 10)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / str(i // 10) / f"{i:03}.png")
    c = config_lib.base()
    c.data.source, c.data.path, c.data.image_size, c.data.channels = "folder", str(tmp_path), 6, 1
    c.data.split = "all"
    c.seed = 3
    return c


def ids(batch) -> list[int]:
    shades = batch["image"].min((1, 2, 3)).astype(int)
    assert (batch["label"] == shades // 100).all()
    return (shades // 10).tolist()


def take(config, n, batch=4, **options):
    iterator = pipeline.train_iterator(config, batch=batch, **options)
    batches = list(itertools.islice(iterator, n))
    iterator.close()
    return batches


def assert_same(got, wanted):
    for batch, expected in zip(got, wanted, strict=True):
        for key in batch.keys() | expected.keys():
            np.testing.assert_array_equal(batch[key], expected[key])


def test_batches_have_the_promised_form(numbered):
    (batch,) = take(numbered, 1)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (4, 6, 6, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32


def test_each_epoch_holds_every_record_once_in_a_new_order(numbered):
    drawn = [i for batch in take(numbered, 23) for i in ids(batch)]
    epochs = [drawn[23 * e : 23 * (e + 1)] for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(numbered):
    first, again = take(numbered, 5), take(numbered, 5)
    assert_same(first, again)
    numbered.seed = 4
    assert [ids(b) for b in take(numbered, 5)] != [ids(b) for b in first]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_each_global_batch(numbered, processes):
    numbered.data.flip = True
    alone = take(numbered, 6, batch=6)
    shares = [
        take(numbered, 6, batch=6 // processes, process_index=p, process_count=processes) for p in range(processes)
    ]
    for k, batch in enumerate(alone):
        together = np.concatenate([share[k]["image"] for share in shares])
        np.testing.assert_array_equal(together, batch["image"])  # row by row, flips included


def test_flips_are_random_and_repeatable(numbered):
    numbered.data.flip = True
    first, again = take(numbered, 50), take(numbered, 50)
    assert_same(first, again)
    images = np.concatenate([batch["image"] for batch in first])
    flipped = images[:, 0, 0, 0] > images[:, 0, -1, 0]
    assert 70 < flipped.sum() < 130  # of 200
    numbered.data.flip = False
    assert [ids(b) for b in take(numbered, 50)] == [ids(b) for b in first]


def test_a_restored_iterator_continues_bit_for_bit(numbered):
    numbered.data.flip = True
    whole = take(numbered, 12)
    iterator = pipeline.train_iterator(numbered, batch=4)
    next(iterator), next(iterator)
    state = iterator.get_state()
    next(iterator)
    iterator.set_state(state)  # back in the same iterator
    assert_same([next(iterator)], whole[2:3])
    iterator.close()
    resumed = pipeline.train_iterator(numbered, batch=4)
    resumed.set_state(state)
    assert_same(itertools.islice(resumed, 10), whole[2:])
    resumed.close()


def test_workers_change_nothing_and_states_move_between_them(numbered):
    numbered.data.flip = True
    whole = take(numbered, 8)
    numbered.data.workers = 2
    iterator = pipeline.train_iterator(numbered, batch=4)
    assert_same(itertools.islice(iterator, 3), whole[:3])
    state = iterator.get_state()
    iterator.set_state(state)
    assert_same(itertools.islice(iterator, 3), whole[3:6])
    iterator.close()
    numbered.data.workers = 0
    resumed = pipeline.train_iterator(numbered, batch=4)
    resumed.set_state(state)
    assert_same(itertools.islice(resumed, 5), whole[3:])


def test_threads_and_batches_ahead_are_those_of_the_config(numbered, monkeypatch):
    whole, calls, options = take(numbered, 3), [], pipeline.grain.ReadOptions
    monkeypatch.setattr(pipeline.grain, "ReadOptions", lambda **kwargs: calls.append(kwargs) or options(**kwargs))
    numbered.data.threads, numbered.data.batches_ahead = 3, 4
    assert_same(take(numbered, 3), whole)
    assert calls == [{"num_threads": 3, "prefetch_buffer_size": 4}]


def damage(config, *numbers: int) -> list[str]:
    names = [sources.open_source(config).name(number) for number in numbers]
    for name in names:
        os.truncate(name, 45)
    return names


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_record_stands_in_for_a_corrupt_one(numbered, workers, caplog):
    numbered.data.flip, numbered.data.max_corrupt = True, 0.1
    whole = take(numbered, 12)
    names = damage(numbered, 11, 12)
    numbered.data.workers = workers
    with caplog.at_level("WARNING", logger="absl"):
        batches = take(numbered, 12)
    undamaged = [i for batch in whole for i in ids(batch)]
    assert [i for batch in batches for i in ids(batch)] == [13 if i in (11, 12) else i for i in undamaged]
    warnings = [line for line in caplog.messages if "skipped unreadable record" in line]
    assert len(warnings) == 2 and all(any(name in line for line in warnings) for name in names)
    resumed = pipeline.train_iterator(numbered, batch=4)
    resumed.set_state({"next_batch": 7})
    assert_same(itertools.islice(resumed, 5), batches[7:])
    resumed.close()


def test_messages_name_the_record_that_stands_in(numbered, monkeypatch, caplog):
    damage(numbered, 11)
    numbered.text.vocabulary, numbered.text.caption = 3, "class"
    named = []

    def encode(c, texts, names):
        named.extend(os.path.basename(names(i)) for i in range(len(texts)))
        return text.TokenizedTexts(np.zeros((2, 3)), np.ones(2))

    monkeypatch.setattr(text, "tokenizer_for_config", lambda c: None)
    monkeypatch.setattr(text, "encode", encode)
    _, read = pipeline.open_records(numbered)
    assert ids(read(np.array([10, 11]))) == [10, 12]
    assert named == ["010.png", "012.png"]
    assert "skipped unreadable record" in caplog.text and "011.png" in caplog.text


def test_too_many_corrupt_records_stop_training_by_name(numbered):
    numbered.data.max_corrupt, numbered.data.workers = 0.05, 1  # 1 of 23
    damage(numbered, 3, 20)
    with pytest.raises(ConfigError, match=r"/0(03|20).png cannot be read.*2 of 23 records.*max_corrupt=0.05") as caught:
        take(numbered, 6)
    assert "\n" not in str(caught.value)


def test_data_without_a_readable_record_are_refused_with_any_limit(numbered):
    numbered.data.max_corrupt = 1.0
    damage(numbered, *range(23))
    with pytest.raises(ConfigError, match="cannot be read .*: 23 of 23 records. Repair the files."):
        take(numbered, 1)


def test_a_deleted_file_is_replaced_by_the_next_record(numbered, monkeypatch):
    source = sources.open_source(numbered)
    os.unlink(source.name(22))  # after listing the folder; the next record is the first one
    monkeypatch.setattr(sources, "open_source", lambda config: source)
    seen = {i for batch in take(numbered, 6) for i in ids(batch)}
    assert seen == set(range(22))


def test_lack_of_memory_is_reported_with_the_image(numbered, monkeypatch):
    def out_of_memory(table, images):
        raise MemoryError

    monkeypatch.setattr(preprocess.Preprocessor, "process_batch", out_of_memory)
    with pytest.raises(ConfigError, match=r"\.png: the memory does not suffice"):
        take(numbered, 1)


class Modules(Source):
    """A source whose labels say which modules its process has imported."""

    names = tuple("abcd")

    def __len__(self):
        return 4

    def read(self, indices):
        loaded = [name in sys.modules for name in ("jax", "jaxlib", "tensorflow", "grain")]
        images = np.broadcast_to(indices[:, None, None, None], (len(indices), 6, 6, 1)).astype(np.uint8)
        return Examples({"image": images}, np.array(loaded, np.int32)[indices])

    def name(self, index):
        return str(index)


def test_workers_never_import_jax(numbered, monkeypatch):
    import jax  # noqa: F401  the parent has it

    monkeypatch.setattr(sources, "open_source", lambda config: Modules())
    numbered.data.workers = 1
    for batch in take(numbered, 4):
        loaded = dict(zip(batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist()))
        assert loaded == {0: 0, 1: 0, 2: 0, 3: 1}


def test_killed_training_leaves_no_workers(numbered, tmp_path):
    numbered.data.workers = 1
    script = tmp_path / "train.py"
    script.write_text(
        "import json, multiprocessing, sys, time\n"
        "import ml_collections\n"
        "from madformer_jax.data import pipeline\n"
        "if __name__ == '__main__':\n"
        "    config = ml_collections.ConfigDict(json.loads(sys.argv[1]))\n"
        "    batches = pipeline.train_iterator(config, batch=2)\n"
        "    next(batches)\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, str(script), numbered.to_json()]
    root = os.path.dirname(os.path.dirname(os.path.dirname(config_lib.__file__)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers and all(map(alive, workers))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.time() + 20
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_dataset_info_describes_the_input_of_the_model(numbered):
    info = pipeline.dataset_info(numbered)
    assert info[:5] == (23, 3, (6, 6, 1), "images", ("0", "1", "2"))
    assert len(info.fingerprint) == 64


def test_the_fingerprint_changes_with_the_records_but_not_with_their_folder(numbered, tmp_path):
    before = pipeline.dataset_info(numbered).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in "012":
        (tmp_path / name).rename(moved / name)
    numbered.data.path = f"{moved}/"
    assert pipeline.dataset_info(numbered).fingerprint == before
    (moved / "0" / "000.png").rename(moved / "0" / "999.png")
    assert pipeline.dataset_info(numbered).fingerprint != before


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_training_never_sees_held_out_records(numbered):
    numbered.data.test_share = 0.3
    numbered.data.split = "train"
    seen = {i for batch in take(numbered, 20) for i in ids(batch)}
    numbered.data.split = "test"
    held_out = {int(name[-7:-4]) for name in names(sources.open_source(numbered))}
    assert 0 < len(held_out) < 12 and seen == set(range(23)) - held_out
    for numbered.data.split in ("test", "train + test[:50%]"):  # the second is one of tfds
        with pytest.raises(ConfigError, match=r"split='.*test.*' is held out"):
            pipeline.train_iterator(numbered, batch=4)


def test_data_that_do_not_fit_the_model_are_refused(numbered, tmp_path):
    numbered.model.classes = 2
    with pytest.raises(ConfigError, match="model.classes=2 is too few.*3 classes"):
        pipeline.dataset_info(numbered)
    numbered.model.classes = 3
    pipeline.dataset_info(numbered)
    numbered.data.path = str(tmp_path / "0")
    with pytest.raises(ConfigError, match="model.classes=3 needs labels"):
        pipeline.dataset_info(numbered)
    numbered.model.classes = 0
    numbered.data.channels = 4
    with pytest.raises(ConfigError, match="data.channels=4: images have 1"):
        pipeline.train_iterator(numbered, batch=2)
