"""Which runs of a sweep are trained, and which train together."""

import contextlib

import pytest

from madformer_jax.modes import sweep as mode
from madformer_jax.runtime import storage
from madformer_jax.sweeps import sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import Sweep, grid
from tests import tiny


@pytest.fixture
def c():
    return tiny.get_config("plain")


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
