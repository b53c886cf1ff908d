"""Tests of the metrics of a training run."""

import errno
import json
import sys
import threading
import types

import numpy as np
import pytest

from madformer_jax.config import schema as config_lib
from madformer_jax.config import validation
from madformer_jax.errors import ConfigError
from madformer_jax.training import metric_writer, trackers
from tests import tiny


def test_metrics_have_one_line_for_each_step(tmp_path):
    """Lines after the checkpoint of the run, and half a line, are removed."""
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    c = tiny.get_config("plain")
    writer = metric_writer.MetricWriter(c, str(tmp_path), 3, 1.0, 1)
    assert writer.figures == {"step": 3, "loss": 3.0}

    def reports():
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert reports() == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "loss_q1": np.nan}
    writer.add(4, metrics)
    writer.add(5, metrics | {"loss": 2.0, "loss_q1": 3.0})
    writer.write()
    writer.close()
    line = reports()[-1]
    assert (line["step"], line["loss"], line["loss_q1"]) == (5, 1.5, 3.0)


def test_slow_disk_does_not_block_and_full_disk_raises(tmp_path, monkeypatch):
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
    free, written = threading.Event(), []

    def append(path, line):
        free.wait(30)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(json.loads(line)["step"])

    monkeypatch.setattr(metric_writer.storage, "append_line", append)
    c = tiny.get_config("plain")
    writer = metric_writer.MetricWriter(c, str(tmp_path), 0, 1.0, 1)
    for step in (1, 2, 3):
        writer.add(step, metrics)
        writer.write()
    assert not written
    free.set()
    with pytest.raises(ConfigError, match="metrics.jsonl cannot be written: .*No space left"):
        writer.close()
    assert written == [1, 2]


def run_of_two_steps(c, workdir, step=0):
    writer = metric_writer.MetricWriter(c, str(workdir), step, 1.0, 1)
    writer.log_start(step + 1, 7, np.zeros((2, 8, 8, 1), np.uint8))
    for k in (step + 1, step + 2):
        writer.add(k, {"loss": float(k), "grad_norm": 1.0, "learning_rate": 0.1})
        writer.write()
    writer.close()


def test_trackio_gets_the_metrics_of_a_run_and_of_its_continuation(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # It reads TRACKIO_DIR when it is imported.
    c = tiny.get_config("plain")
    c.train.log_to = "trackio"
    run_of_two_steps(c, tmp_path / "run")
    run_of_two_steps(c, tmp_path / "run", 2)
    name = trackers.run_name(str(tmp_path / "run"))
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs(trackers.PROJECT, name)
    assert [(line["step"], line["loss"]) for line in logs if "loss" in line] == [(k, float(k)) for k in (1, 2, 3, 4)]
    assert sum("training_images" in line for line in logs) == 2
    assert (tmp_path / "trackio" / "madformer_jax.db").exists()


def test_wandb_gets_the_metrics_of_a_run(tmp_path, monkeypatch):
    """A stand-in with the functions that are called: the package needs no test here."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, [*values])), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(Image=lambda x: x.shape, init=lambda **given: calls.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    c = tiny.get_config("plain")
    c.train.log_to = "wandb"
    run_of_two_steps(c, tmp_path / "run #2: 50%")
    assert calls[0]["id"].startswith("run _2_ 50_-")  # wandb refuses / \\ # ? % : in an id
    assert calls[0]["mode"] == "offline" and calls[0]["config"]["model"]["width"] == 16
    assert calls[1:3] == [(1, ["parameters"]), (1, ["training_images"])]
    assert [call[0] for call in calls[3:5]] == [1, 2] and "loss" in calls[3][1] and calls[5:] == ["end"]


def test_a_tracker_that_fails_ends_alone(tmp_path, monkeypatch, caplog):
    written = []

    class Working(trackers.Tracker):
        def __init__(self, c, workdir):
            pass

        write_image = write_scalars = lambda self, step, *_: written.append(step)
        close = lambda self: written.append("end")  # noqa: E731

    class Broken(Working):
        title = "Broken"

        def write_scalars(self, step, values):
            raise OSError("it broke")

    monkeypatch.setattr(trackers, "TRACKERS", {"broken": Broken, "working": Working})
    c = tiny.get_config("plain")
    c.train.log_to = "broken, working"
    run_of_two_steps(c, tmp_path)
    assert written == [1, 1, 1, 2, "end"]
    assert [r.getMessage() for r in caplog.records if "nothing more" in r.getMessage()] == [
        "Broken: a write failed, so nothing more is written to it: it broke"
    ]


def test_a_tracker_without_its_package_is_refused(monkeypatch):
    c = tiny.get_config("plain")
    c.train.log_to = "tensorboard,wandb"
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ConfigError, match=r"log_to='tensorboard,wandb' needs the package wandb: pip install wandb\.$"):
        trackers.check_installed(c)
    c.train.log_to = "tensorbord"
    with pytest.raises(ConfigError, match="tensorbord.*tensorboard, trackio, wandb"):
        config_lib.validate(c)
    assert tuple(trackers.TRACKERS) == validation.TRACKERS
