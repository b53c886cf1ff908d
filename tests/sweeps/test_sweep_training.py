"""Which runs of a sweep are trained, which train together, and what their sample grids show."""

import contextlib
import types

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.modes import sweep as mode
from madformer_jax.runtime import storage
from madformer_jax.sweeps import sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import Sweep, grid
from tests import tiny


@pytest.fixture
def c():
    return tiny.get_config("plain")


def test_too_many_held_out_images_end_a_sweep_before_its_judge(c, tmp_path, monkeypatch):
    c.evaluate.by_block, c.evaluate.n = True, 2000
    monkeypatch.setattr(mode.reference, "run", lambda *args: pytest.fail("makes a judge"))
    module = types.SimpleNamespace(__file__="seeds.py", sweep=lambda: Sweep("?", grid({}, seeds=2), {"steps": (1,)}))
    with pytest.raises(ConfigError, match="^2000 held-out images are too many: split 'test' has 1000"):
        mode.run(c, str(tmp_path), file=types.SimpleNamespace(module=module, args=()))


def test_a_kill_between_the_last_step_and_its_validation_loses_no_validation(c, tmp_path, monkeypatch):
    """The kill may also leave half of the line."""
    c.train.validate_every = 5
    monkeypatch.setattr(mode.checkpoint, "complete_steps", lambda folder: [c.train.steps])
    storage.write_text(
        tmp_path / "metrics.jsonl", '{"step": 6, "loss": 0.1}\n{"step": 5, "validated": 8}\n{"step": 6, "va'
    )
    assert not mode._is_trained(c, str(tmp_path))
    storage.append_line(tmp_path / "metrics.jsonl", '{"step": 6, "validated": 8}')
    assert mode._is_trained(c, str(tmp_path))
    assert [line["step"] for line in sweep_folder.metric_lines(str(tmp_path))] == [6, 5, 6]
    storage.write_text(tmp_path / "metrics.jsonl", "")
    c.train.validate_every = 0
    assert mode._is_trained(c, str(tmp_path))


def test_a_run_that_does_not_join_a_group_stays_free_for_other_processes(c, tmp_path, monkeypatch):
    """It has trained further than the others."""
    c.train.lanes = 3
    definition = Sweep("?", grid({}, seeds=3), {"steps": (1,)})
    runs = sweep_file.expand_runs(definition, c)
    job = sweep_folder.Job("seeds", "", definition, runs, [], str(tmp_path))
    monkeypatch.setattr(mode, "_newest_step", lambda job, run: [int(run is runs[1])])
    monkeypatch.setattr(mode.jax, "device_count", lambda: 1)
    with contextlib.ExitStack() as claims:
        assert mode._claim_lanes(job, runs[0], claims) == [runs[2]]
        assert [path.parent.name for path in tmp_path.glob("claims/*/lock.json")] == [runs[2].name]
    assert not list(tmp_path.glob("claims/*/lock.json"))


@pytest.mark.parametrize("by_block", ["constant", "linear:1.5x:0.5x"])
def test_each_row_of_a_sample_grid_has_the_steps_of_its_evaluation(c, tmp_path, monkeypatch, by_block):
    """Without steps by block, the program of one row serves all, with padded coefficients."""
    codec = types.SimpleNamespace(decode=None)
    trained = types.SimpleNamespace(
        class_names=[], mesh=None, codec=codec, load_codec_params=dict, sampled=lambda c: (None, None)
    )
    c.model.blocks, drawn = 4, []

    def batches(setting, program, *args, **kwargs):
        drawn.append((setting.sample.steps, program))
        return [types.SimpleNamespace(images=np.zeros((8, 2, 2, 1), np.uint8))]

    monkeypatch.setattr(mode.TrainedModel, "open", lambda *args, **kwargs: trained)
    monkeypatch.setattr(mode.partitioning, "scope", contextlib.nullcontext)
    monkeypatch.setattr(mode.generation, "make_sample_fn", lambda setting, *args: setting.sample.steps)
    monkeypatch.setattr(mode.generation, "batches", batches)
    monkeypatch.setattr(mode.solving, "pad_steps", lambda program, setting, size: "padded")
    definition = Sweep("?", grid({"sample.steps_by_block": (by_block,)}), {"steps": (2, 4)})
    (run,) = sweep_file.expand_runs(definition, c)
    mode._write_sample_grid(sweep_folder.Job("x", "", definition, [run], [], str(tmp_path)), run, [2, 4])
    assert drawn == ([(2, "padded"), (4, "padded")] if by_block == "constant" else [(2, 2), (4, 4)])
