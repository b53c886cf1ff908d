"""Tests of --mode=train.

Most tests replace the training step, which tests/training/test_train_step.py tests, by one that
only counts. The file has over 400 lines because all tests share the runs of its fixtures.
"""

import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from madformer_jax.data import pipeline, text
from madformer_jax.errors import ConfigError
from madformer_jax.modes import export, train
from madformer_jax.runtime import checkpoint, lock, storage
from madformer_jax.sampling import generation
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.training import initial_weights, metric_writer, train_step
from tests import tiny
from tests.data import odd_captions
from tests.kill import final

pytestmark = pytest.mark.usefixtures("one_device", "created_once")
BROKEN, real_batches = "it broke", generation.batches


@pytest.fixture
def plain():
    c = tiny.get_config("plain")
    c.sample.n = c.sample.batch = 2
    return c


@pytest.fixture(scope="module")
def created_once():
    """Creates the state of step 0 once for the whole module, and once with power-function averages.

    Only the latter has a real optimizer. Half of the time of most tests would be saving its arrays.
    """
    real, made = train_step.create_state, {}

    def create_state(model, tx, seed, mesh, power_ema=False):
        if power_ema not in made:
            tx = tx if power_ema else optax.scale_by_schedule(lambda step: 1.0)
            create, abstract = real(model, tx, seed, mesh, power_ema)
            made[power_ema] = jax.device_get(create()), abstract
        return lambda: jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), *made[power_ema]), made[power_ema][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "create_state", create_state)
        yield


def count(patch):
    """Patches the step to add 1 to every parameter and average, and the samples to be zeros."""

    def make_step(s, c, platform=None):
        def step(state, batch, codec_params, seed):
            rate = train_step.learning_rate(c)(state.step)
            metrics = {"loss": jnp.mean(batch["image"]), "grad_norm": jnp.ones(()), "learning_rate": rate, "seed": seed}
            params, ema = jax.tree.map(lambda x: x + 1, (state.params, state.ema))
            return train_step.State(state.step + 1, params, ema, state.opt), metrics

        return step

    def batches(c, sample_fn, params, codec_params, mesh, numbers, max_batch=None):
        for number in numbers:
            yield generation.SampleBatch(
                np.array([number]), np.zeros(1, np.int32), np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1)
            )

    patch.setattr(train_step, "make_step", make_step)
    patch.setattr(generation, "batches", batches)


@pytest.fixture
def counting(monkeypatch):
    count(monkeypatch)


class Data:
    """A data iterator that calls a function before a batch."""

    def __init__(self, real, at, act):
        self.set_state, self.get_state, self.close = real.set_state, real.get_state, real.close
        self._real, self._at, self._act = real, at, act

    def __next__(self):
        if self.get_state()["next_batch"] + 1 == self._at:
            self._act()
        return next(self._real)


@pytest.fixture(scope="module")
def runs(created_once, tmp_path_factory):
    """Workdirs of a finished run, "whole", and of one stopped at step 3 of 6, "half"."""
    folder, devices = tmp_path_factory.mktemp("runs"), jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: devices)
        count(patch)
        train.run(tiny.get_config("plain"), str(folder / "whole"))
        before_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train.run(tiny.get_config("plain"), str(folder / "half"))
    return folder


@pytest.fixture
def half(counting, runs, tmp_path):
    return shutil.copytree(runs / "half", tmp_path / "half")


def before_batch(patch, at, act):
    real = pipeline.train_iterator
    patch.setattr(pipeline, "train_iterator", lambda *args, **kwargs: Data(real(*args, **kwargs), at, act))


def fail(*args, **kwargs):
    raise OSError(28, BROKEN)


def reports(workdir):
    return list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


def saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def assert_same_end(c, a, b):
    jax.tree.map(np.testing.assert_array_equal, final(c, a), final(c, b))


# ---- stopping and resuming


@pytest.mark.slow
def test_stopped_run_continues_bit_for_bit(plain, tmp_path, monkeypatch):
    """Uses the real step and real samples. SIGTERM comes while batch 3 is fetched."""
    plain.train.keep, plain.train.ema_snapshots, steps = 1, 2, []
    real = train_step.make_step
    monkeypatch.setattr(train_step, "make_step", lambda s, c: steps.append(real(s, c)) or steps[0])  # compiles once
    figures = train.run(plain, str(tmp_path / "whole"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.run(plain, str(tmp_path / "parts"))["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert final(plain, tmp_path / "parts")[0] == 3
    assert train.run(plain, str(tmp_path / "parts")).keys() == figures.keys()
    assert_same_end(plain, tmp_path / "parts", tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole" / "samples").iterdir()) == ["step_000006_ema.png"]
    lines = reports(tmp_path / "whole")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1] == figures
    assert figures["loss"] > 0 and figures["images_per_second"] > 0
    assert [line["step"] for line in reports(tmp_path / "parts")] == [2, 3, 4, 6]
    # Old snapshots hold averages only, and the combination of all for a stored width is the stored average.
    assert {path.name for path in (tmp_path / "parts" / "checkpoints" / "2").iterdir() if path.is_dir()} == {
        "ema",
        "power_ema",
        "meta",
    }
    assert saved(tmp_path / "parts") == [2, 4, 6]
    averages = final(plain, tmp_path / "parts")[1]["power_ema"]
    plain.sample.ema = 0.1
    combined = TrainedModel.open(plain, str(tmp_path / "parts"))
    assert combined.step == 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), combined.params, averages["wide"])
    plain.train.ema_snapshots = 0
    with pytest.raises(ConfigError, match="config.sample.ema=0.1 needs a training with config.train.ema_snapshots"):
        TrainedModel.open(plain, str(tmp_path / "parts"))
    plain.train.ema_snapshots, plain.sample.ema, plain.sample.step = 2, 0.2, 5
    with pytest.raises(ConfigError, match="no checkpoint of step 5 .* only of 2, 4, 6"):
        TrainedModel.open(plain, str(tmp_path / "parts"))


@pytest.mark.parametrize("step", [3, 6])  # of 6
def test_first_ctrl_c_saves_and_stops_and_second_kills(counting, plain, tmp_path, monkeypatch, capfd, step):
    plain.seed, handlers = 7, []

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    before_batch(monkeypatch, step, interrupt)
    monkeypatch.setattr(generation, "batches", lambda *args, **kwargs: pytest.fail("draws"))
    figures = train.run(plain, str(tmp_path))
    assert (figures["step"], figures["stopped"], figures["seed"], saved(tmp_path)[-1]) == (step, True, 7, step)
    assert (handlers, signal.getsignal(signal.SIGINT)) == ([signal.SIG_DFL], before)
    assert "Ctrl-C again leaves at once" in capfd.readouterr().err


@pytest.mark.parametrize("broken", ["data", "metrics"])
def test_error_saves_the_last_finished_step(counting, plain, tmp_path, runs, broken):
    # A thread writes the metrics. Its error is raised at the next save at the latest.
    plain.train.log_every, plain.train.checkpoint_every = 1, 4 if broken == "data" else 3
    with pytest.MonkeyPatch.context() as patch:
        if broken == "data":
            before_batch(patch, 4, fail)
        else:
            written = storage.append_line
            patch.setattr(
                storage, "append_line", lambda path, text: fail() if '"step": 3' in text else written(path, text)
            )
        with pytest.raises((OSError, ConfigError), match=BROKEN) as error:
            train.run(plain, str(tmp_path / "parts"))
    assert isinstance(error.value, ConfigError) == (broken == "metrics")
    assert saved(tmp_path / "parts") == [3]
    train.run(plain, str(tmp_path / "parts"))
    assert_same_end(plain, tmp_path / "parts", runs / "whole")


def test_failed_start_does_not_fix_the_config(counting, plain, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, 1, fail)
        with pytest.raises(OSError, match=BROKEN):
            train.run(plain, str(tmp_path))
    assert not (tmp_path / "config.json").exists()
    plain.train.batch = 4
    train.run(plain, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["batch"] == 4


def test_non_finite_loss_stops_the_run_and_is_never_saved(counting, plain, tmp_path, monkeypatch):
    finite = train_step.make_step

    def make_step(s, c):
        def step(state, batch, codec_params, seed):
            state, metrics = finite(s, c)(state, batch, codec_params, seed)
            return state, metrics | {"loss": jnp.where(state.step == 5, jnp.nan, 1.0)}

        return step

    monkeypatch.setattr(train_step, "make_step", make_step)
    with pytest.raises(ConfigError, match=r"at step 5: .* last good checkpoint: step 4 of .*\.$"):
        train.run(plain, str(tmp_path))
    assert saved(tmp_path) == [2, 4]
    assert [line["step"] for line in reports(tmp_path)] == [2, 4]


def test_old_checkpoints_are_deleted(counting, plain, tmp_path):
    plain.train.checkpoint_every, plain.train.keep, plain.train.keep_every = 1, 1, 2
    plain.train.steps = 5
    train.run(plain, str(tmp_path))
    assert saved(tmp_path) == [2, 4, 5]
    plain.train.steps = 6
    assert train.run(plain, str(tmp_path))["step"] == 6


def test_second_training_in_a_workdir_is_refused(plain, tmp_path):
    with lock.acquire(str(tmp_path)), pytest.raises(ConfigError, match=f"is written by process {os.getpid()}"):
        train.run(plain, str(tmp_path))


# ---- changed configs and data


def test_steps_accumulation_and_rate_may_change_and_the_schedule_follows(half, plain, caplog):
    caplog.set_level(logging.INFO, "absl")
    plain.train.steps, plain.train.accumulate, plain.optimizer.learning_rate = 5, 2, 5e-4
    assert train.run(plain, str(half))["step"] == 5
    assert "config.train.steps was 6 and is 5" in caplog.text
    assert "config.train.accumulate was 1 and is 2" in caplog.text
    assert "config.optimizer.learning_rate was 0.001 and is 0.0005" in caplog.text
    assert reports(half)[-1]["learning_rate"] == float(train_step.learning_rate(plain)(4))
    assert json.loads((half / "config.json").read_text())["train"]["steps"] == 5
    plain.train.steps = 4
    with pytest.raises(ConfigError, match=r"config\.train\.steps=4, but .* has been trained for 5 steps"):
        train.run(plain, str(half))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.width", 8), ("train.batch", 4), ("seed", 1), ("loss.hidden", 0.5), ("optimizer.clip", 0.0),
        ("text.tokenizer", "other.json"), ("data.flip", True), ("data.split", "all"),
    ],
)  # fmt: skip
def test_a_workdir_of_another_config_is_refused_by_field(half, plain, field, value):
    plain.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=rf"config\.{field} was .* and is {value!r}") as error:
        checkpoint.check_config(plain, str(half))
    assert "\n" not in str(error.value)
    plain = tiny.get_config("plain")
    plain.train.log_every, plain.sample.n, plain.mesh.fsdp, plain.data.workers = 1, 3, 2, 1
    checkpoint.check_config(plain, str(half))  # These fields may change.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("7", "8")}, r"its classes \(no longer 0, 1, 2, 3, 4, 5, 6, 9\)"),
        ({"names": tuple("1023456789")}, r"its classes \(in another order\)"),
        ({"records": 3}, r"its records \(4000 then, 3 now\)"),
        ({"fingerprint": "other"}, "the content or the order of its 4000 records"),
    ],
)
def test_changed_data_set_is_refused_and_nothing_is_written(half, plain, monkeypatch, change, message):
    real = pipeline.dataset_info
    monkeypatch.setattr(pipeline, "dataset_info", lambda c: real(c)._replace(**change))
    with pytest.raises(ConfigError, match=f"has changed since step 3 of .*{message}") as error:
        train.run(plain, str(half))
    assert "\n" not in str(error.value)
    assert saved(half) == [2, 3]


def test_changed_tokenizer_is_refused(counting, plain, tmp_path):
    words = tmp_path / "words.json"
    odd_captions.write_tokenizer(words, "plain")
    plain.text.tokenizer, plain.text.length = str(words), 12
    plain.text.vocabulary = text.open_tokenizer(str(words)).vocabulary
    plain.data.source, plain.data.path, plain.data.split = "folder", str(tmp_path / "images"), "all"
    plain.train.batch = plain.train.steps = 2
    odd_captions.write_captions(tmp_path / "images", "jsonl_bom")
    train.run(plain, str(tmp_path / "run"), grids=False)
    plain.train.steps = 4
    original = words.read_text()
    words.write_text(original.replace('"red"', '"x"').replace('"two"', '"red"').replace('"x"', '"two"'))
    text.open_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match=r"words\.json' has changed since step 2 of .*run: its SHA-256 was") as error:
        train.run(plain, str(tmp_path / "run"), grids=False)
    assert "\n" not in str(error.value) and saved(tmp_path / "run") == [2]
    words.write_text(original)
    text.open_tokenizer.cache_clear()
    assert train.run(plain, str(tmp_path / "run"), grids=False)["step"] == 4


@pytest.mark.parametrize("source", ["run", "export"])
def test_training_starts_from_the_weights_of_init_from(half, plain, tmp_path, source):
    ema = final(plain, half)[1]["ema"]
    if source == "export":
        export.run(plain, str(half))
        shutil.rmtree(half / "checkpoints")
        half = half / "export"
    plain.train.init_from, plain.train.batch, plain.train.steps = str(half), 4, 1
    assert train.run(plain, str(tmp_path / "new"))["step"] == 1
    _, trees, data = final(plain, tmp_path / "new")
    assert data == {"next_batch": 1}
    for tree in (trees["params"], trees["ema"]):
        jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old + 1), tree, ema)


def test_weights_that_fit_are_taken_and_the_others_are_named(half, plain, monkeypatch, caplog):
    """The new model has other blocks, other pixels in a patch and classes."""
    stored = final(plain, half)[1]["ema"]
    plain.train.init_from, plain.codec.patch, plain.model.blocks, plain.model.classes = str(half), 8, 4, 3
    s = train_step.make_setup(plain)
    mesh = train.partitioning.make_mesh(1, 1, 1)
    shapes = generation.abstract_params(s.model, mesh)
    new = jax.tree.map(lambda x: jax.device_put(jnp.full(x.shape, 7.0), x.sharding), shapes)
    state = initial_weights.load(plain, train_step.State(jnp.zeros(()), new, new, None))
    fitting, own = 0, dict(jax.tree_util.tree_leaves_with_path(stored))
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        fits = path in own and own[path].shape == x.shape
        np.testing.assert_array_equal(x, own[path] if fits else np.full(x.shape, 7.0))
        fitting += fits
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    lines = [r.getMessage() for r in caplog.records if "init_from: " in r.getMessage()]
    assert "init_from: boi does not fit: (64, 16) in the weights, (4, 16) in the model" in lines
    assert "init_from: embedding/embedding does not fit: no array in the weights, (4, 16) in the model" in lines
    assert sum("does not fit" in line for line in lines) == len(jax.tree.leaves(new)) - fitting
    assert any("config.codec.patch was 4 and is 8" in line for line in lines)
    assert fitting > len(jax.tree.leaves(new)) / 2


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "nowhere does not exist"), ("half", "no array of .*half has the name and the shape")],
)
def test_weights_of_which_none_fits_are_refused(half, plain, source, message):
    plain.train.init_from = str(half) if source == "half" else source
    mesh = train.partitioning.make_mesh(1, 1, 1)
    other = {"other": jax.device_put(jnp.zeros(3), train.partitioning.replicated(mesh))}
    with pytest.raises(ConfigError, match=rf"config\.train\.init_from: .*{message}") as error:
        initial_weights.load(plain, train_step.State(jnp.zeros(()), other, other, None))
    assert "\n" not in str(error.value)


# ---- samples


def test_errors_in_a_grid_do_not_end_the_run(counting, plain, tmp_path, monkeypatch, caplog):
    """At step 1 a sample is not finite, at step 2 the disk is full, at step 3 TensorBoard fails."""
    plain.train.sample_every, plain.train.steps, plain.train.log_to = 1, 4, "tensorboard"
    real, png = generation.batches, generation.write_png
    monkeypatch.setattr(
        generation,
        "make_sample_fn",
        lambda *args: lambda *args: (np.zeros((2, 32, 32, 1)), nan, np.array([True, False])),
    )
    nan = np.full((2, 8, 8, 16), np.nan)
    seen = []

    def batches(c, sample_fn, params, *args, **kwargs):
        seen.append(saved(tmp_path) if (tmp_path / "checkpoints").exists() else [])
        return (
            real_batches(c, sample_fn, params, *args, **kwargs)
            if len(seen) == 1
            else real(c, sample_fn, params, *args, **kwargs)
        )

    monkeypatch.setattr(generation, "batches", batches)
    monkeypatch.setattr(
        generation, "write_png", lambda path, image: fail() if "000002" in path.name else png(path, image)
    )
    monkeypatch.setattr(
        metric_writer.MetricWriter,
        "log_image",
        lambda self, *args: self._submit_to_trackers(fail) if len(seen) == 3 else None,
    )
    assert train.run(plain, str(tmp_path))["step"] == 4
    assert (
        "the samples of step 1 are left out: sampling gave values that are not finite: image 0 from block 1 on"
        in caplog.text
    )
    assert f"step_000002_ema.png cannot be written: {BROKEN}" in caplog.text
    assert f"TensorBoard: a write failed, so nothing more is written to it: {BROKEN}" in caplog.text
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == ["step_000003_ema.png", "step_000004_ema.png"]
    assert seen == [[], [2], [2], [2, 4]]  # Each step is saved before its grid.
    assert [line["step"] for line in reports(tmp_path)] == [2, 4]


def test_stop_signal_ends_a_grid_between_batches(counting, plain, tmp_path, monkeypatch):
    plain.train.sample_every, plain.sample.n, plain.sample.batch = 1, 9, 1
    real, drawn = generation.batches, []

    def batches(*args, **kwargs):
        for batch in real(*args, **kwargs):
            drawn.append(int(batch.numbers[0]))
            if len(drawn) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(generation, "batches", batches)
    assert train.run(plain, str(tmp_path))["step"] == 1
    assert drawn == [0, 1, 2, 3]
    assert saved(tmp_path) == [1]
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("steps", ["2:3", "5:5"])
def test_profile_traces_the_named_steps(plain, tmp_path, monkeypatch, steps):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    plain.profile = steps
    with train._make_profiler(plain, str(tmp_path), 0) as profile:
        for step in range(6):
            profile(step)
            calls.append(step)
    assert calls == {"2:3": [0, 1, "start", 2, 3, "stop", 4, 5], "5:5": [0, 1, 2, 3, 4, "start", 5, "stop"]}[steps]


def test_microbatch_not_divisible_by_the_devices_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.undo()  # back to all eight devices
    plain.mesh.data, plain.train.accumulate = 8, 2
    with pytest.raises(ConfigError, match="a microbatch of 4 images"):
        train.run(plain, str(tmp_path))
    assert not list(tmp_path.iterdir())
