"""Tests of the metrics of a training run."""

import errno
import json
import threading

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.training import metric_writer
from tests import tiny


def test_metrics_have_one_line_for_each_step(tmp_path):
    """Lines after the checkpoint of the run, and half a line, are removed."""
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    writer = metric_writer.MetricWriter(tiny.get_config("plain"), str(tmp_path), 3, 1.0, 1)
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
    writer = metric_writer.MetricWriter(tiny.get_config("plain"), str(tmp_path), 0, 1.0, 1)
    writer._tensorboard_works = False
    for step in (1, 2, 3):
        writer.add(step, metrics)
        writer.write()
    assert not written
    free.set()
    with pytest.raises(ConfigError, match="metrics.jsonl cannot be written: .*No space left"):
        writer.close()
    assert written == [1, 2]
