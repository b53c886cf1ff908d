import json
import os
import re
import subprocess
import sys

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from madformer_jax.cli import command_line
from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError
from madformer_jax.modes import benchmark
from tests import QUICK, tiny

TIMED = {"compile_seconds", "seconds", "images_per_second", "tflop", "tflops", "mfu", "program_gib", "process_gib"}


@pytest.mark.slow
def test_every_part_is_measured_and_written_as_json(tmp_path, monkeypatch, capsys):
    """Two devices share an odd `sample.batch`, which is rounded up as in sampling."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *a: devices)
    c = tiny.get_config("plain")
    c.benchmark.steps, c.mesh.data, c.sample.batch = 1, 2, 5
    report = json.loads(json.dumps(benchmark.run(c, str(tmp_path))))
    assert report == json.loads((tmp_path / "benchmark.json").read_text())
    assert (report["attention"], report["dtype"]) == ("blocks", "float32")
    assert set(report["train"]) == TIMED
    assert set(report["sample"]) == TIMED | {"nfe", "passes", "seconds_per_image", "batch"}
    assert report["sample"]["batch"] == 6
    assert set(report["data"]) == {"seconds", "images_per_second"}
    for part in ("train", "sample", "data"):
        assert all(figure > 0 for figure in report[part].values()), report[part]
        batch = 6 if part == "sample" else c.train.batch
        assert report[part]["images_per_second"] == pytest.approx(batch / report[part]["seconds"])
    assert report["train"]["tflop"] == pytest.approx(flops.training_step(c).total / 1e12)
    assert report["sample"]["tflop"] == pytest.approx(flops.sampling(c, 6).total / 1e12)
    assert report["sample"]["nfe"] == pytest.approx(flops.nfe(c))
    assert report["sample"]["passes"] == pytest.approx(flops.model_passes(c))
    table = capsys.readouterr().out
    for name in ("compile time", "images/s", "MFU", "NFE per image", "passes per image", "program memory"):
        assert name in table


def test_an_unknown_part_is_an_error(tiny_config, tmp_path):
    tiny_config.benchmark.parts = "train,fid"
    with pytest.raises(ConfigError, match="'fid' is not a part: use any of train, sample, data"):
        benchmark.run(tiny_config, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_logs_its_speed_and_traces_the_profiled_steps(tmp_path):
    """Runs in a separate process: the profiler conflicts with modules of other tests.

    test_train.py tests which steps are traced.
    """
    settings = {"train.steps": 4, "train.checkpoint_every": 4, "profile": "2:3", "sample.n": 1}
    settings["train.log_to"] = "tensorboard"
    done = subprocess.run(
        [sys.executable, "-m", "madformer_jax.main", "--config=tests/tiny.py:plain", f"--workdir={tmp_path}"]
        + [f"--config.{name}={value}" for name, value in settings.items()],
        env={**os.environ, "XLA_FLAGS": QUICK}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 4/4 .* TFLOP/s  MFU \d+ %", done.stderr)
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz"))
    events = EventAccumulator(str(tmp_path)).Reload()
    text = tensor_util.make_ndarray(events.Tensors("config")[0].tensor_proto).item().decode()
    assert '"steps": 4' in text and "--mode=evaluate" in done.stdout
    assert events.Tensors("training_images") and events.Tensors("parameters")
    speed = {
        name: float(tensor_util.make_ndarray(events.Tensors(name)[-1].tensor_proto))
        for name in ("steps_per_second", "tflops", "mfu")
    }
    cost = flops.training_step(command_line.parse(["", "--config=tests/tiny.py:plain", "--workdir=-"])[0]).total
    assert speed["tflops"] == pytest.approx(cost * speed["steps_per_second"] / 1e12, rel=1e-3)
    peak = float(re.search(r"peak (\S+) TFLOP/s", done.stderr)[1])
    assert speed["mfu"] == pytest.approx(speed["tflops"] / peak, rel=1e-2)  # the log gives three digits
