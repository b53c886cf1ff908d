import json

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from madformer_jax import benchmark, flops, partitioning, train
from madformer_jax.config import ConfigError

TIMED = {"compile_seconds", "seconds", "images_per_second", "tflop", "tflops", "mfu", "program_gib", "process_gib"}


@pytest.fixture
def one_device(monkeypatch):
    """A mesh of the first device only, as on a plain CPU."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(partitioning.jax, "devices", lambda *a: devices)


def test_every_part_is_measured_and_written_as_json(tiny_config, tmp_path, one_device, capsys):
    c = tiny_config
    c.benchmark.steps = 1
    benchmark.run(c, str(tmp_path))
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert (report["attention"], report["dtype"]) == ("blocks", "float32")
    assert set(report["train"]) == TIMED
    assert set(report["sample"]) == TIMED | {"nfe", "seconds_per_image"}
    assert set(report["data"]) == {"seconds", "images_per_second"}
    for part in ("train", "sample", "data"):
        assert all(figure > 0 for figure in report[part].values()), report[part]
        batch = c.sample.batch if part == "sample" else c.train.batch
        assert report[part]["images_per_second"] == pytest.approx(batch / report[part]["seconds"])
    assert report["train"]["tflop"] == pytest.approx(flops.training_step(c).total / 1e12)
    assert report["sample"]["tflop"] == pytest.approx(flops.sampling(c, c.sample.batch).total / 1e12)
    assert report["sample"]["nfe"] == pytest.approx(flops.nfe(c))
    table = capsys.readouterr().out
    assert all(name in table for name in ("compile time", "images/s", "MFU", "NFE an image", "memory of the program"))


def test_an_unknown_part_is_one_line(tiny_config, tmp_path):
    tiny_config.benchmark.parts = "train,fid"
    with pytest.raises(ConfigError, match="'fid' is no part: some of train, sample, data"):
        benchmark.run(tiny_config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_training_logs_its_speed_and_traces_the_steps_asked_for(tiny_config, tmp_path, one_device, caplog):
    c = tiny_config
    c.train.steps, c.train.log_every, c.train.checkpoint_every, c.profile = 4, 2, 4, "2:3"
    with caplog.at_level("INFO"):
        train.run(c, str(tmp_path))
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("step 4/4"))
    assert "TFLOP/s  MFU " in line
    events = EventAccumulator(str(tmp_path)).Reload()
    speed = {
        name: float(tensor_util.make_ndarray(events.Tensors(name)[-1].tensor_proto))
        for name in ("steps_per_second", "tflops", "mfu")
    }
    cost = flops.training_step(c).total
    assert speed["tflops"] == pytest.approx(cost * speed["steps_per_second"] / 1e12, rel=1e-3)
    assert speed["mfu"] == pytest.approx(1e12 * speed["tflops"] / flops.peak(), rel=1e-3)
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz"))
    (traced,) = (r.getMessage() for r in caplog.records if "profiler trace" in r.getMessage())
    assert "steps 2 to 3" in traced
