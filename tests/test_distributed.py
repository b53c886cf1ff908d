"""Two and four real processes on loopback do what one process does."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from madformer_jax import drawing, training
from madformer_jax.runtime import checkpoint, partitioning
from tests import QUICK, tiny

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12


def start(processes, workdir, cache, **environment):
    """Runs launch/local.sh to its end; four devices in all. Returns its exit status and what it printed."""
    settings = {
        "config.mesh.data": 2,
        "config.mesh.fsdp": 2,
        "config.train.steps": STEPS,
        "config.train.log_every": 1,
        "config.train.checkpoint_every": 4,
        "config.compilation_cache": cache,
        "workdir": workdir,
    }
    done = subprocess.run(
        ["launch/local.sh", str(processes), "--grace=1", "--", "--config=tests/tiny.py:plain"]
        + [f"--{name}={value}" for name, value in settings.items()],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes} {QUICK}",
            "MADFORMER_COMMAND": f"{sys.executable} -u -m tests.worker",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def losses(workdir):
    """Step -> all losses that were written for it."""
    found = {}
    for file in workdir.glob("events.out.*"):
        events = EventAccumulator(str(file), {"tensors": 0}).Reload()  # 0: all of them
        for event in events.Tensors("loss"):
            found.setdefault(event.step, []).append(float(tensor_util.make_ndarray(event.tensor_proto)))
    return found


def final(workdir):
    """Step, parameters and data state of the newest checkpoint."""
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    target = drawing.abstract_params(training.setup(tiny.get_config("plain")).model, mesh)
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        step, trees, data = checkpoints.restore({"params": target}, data=True)
    return step, jax.device_get(trees["params"]), data


def samples(workdir):
    (folder,) = (workdir / "samples").glob(f"step_{STEPS:06d}_*_n5_*")
    return drawing.Drawn(*map(np.concatenate, zip(*drawing.read_shards(folder), strict=True)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process with all four devices."""
    folder = tmp_path_factory.mktemp("alone")
    status, output = start(1, folder / "run", folder / "cache", MADFORMER_SAMPLE="1")
    assert status == 0, output
    return folder / "run"


def assert_same_run(workdir, alone):
    written, expected = losses(workdir), losses(alone)
    assert sorted(written) == sorted(expected) == list(range(1, STEPS + 1))
    for step, values in written.items():
        np.testing.assert_allclose(values, expected[step][0], rtol=1e-5)
    (step, params, data), (_, expected_params, expected_data) = final(workdir), final(alone)
    assert (step, data) == (STEPS, expected_data)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (params, expected_params))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    drawn, expected_drawn = samples(workdir), samples(alone)
    assert drawn.numbers.tolist() == list(range(5))
    np.testing.assert_array_equal(drawn.labels, expected_drawn.labels)
    np.testing.assert_allclose(drawn.latents, expected_drawn.latents, rtol=1e-3, atol=1e-3)


def test_four_processes_train_and_sample_as_one_and_write_once(tmp_path, alone):
    status, output = start(4, tmp_path / "run", tmp_path / "cache", MADFORMER_SAMPLE="1")
    assert status == 0, output
    assert_same_run(tmp_path / "run", alone)
    assert all(len(values) == 1 for values in losses(tmp_path / "run").values())
    found, expected = (
        sorted(p.name.split("_n5_")[0] for p in (workdir / "samples").rglob("*"))
        for workdir in (tmp_path / "run", alone)
    )
    assert found == expected


def test_two_processes_survive_the_death_of_one_and_a_notice_to_stop(tmp_path, alone):
    """Process 1 is killed at step 6; all start again; process 1 alone hears SIGTERM at step 8; all start again."""
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    status, output = start(2, workdir, cache, MADFORMER_SIGNAL="1:6:KILL")
    assert status == 128 + 9, output
    assert final(workdir)[0] == 4
    status, output = start(2, workdir, cache, MADFORMER_SIGNAL="1:6:TERM")
    assert status == 0, output
    assert "going on from step 4" in output
    assert 6 < final(workdir)[0] < STEPS, output
    status, output = start(2, workdir, cache, MADFORMER_SAMPLE="1")
    assert status == 0, output
    assert_same_run(workdir, alone)
