"""Several real processes on loopback do what one does, though one dies and one is asked to stop."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from madformer_jax.evaluation.networks import classifier
from madformer_jax.modes import evaluate, reference, sample, train
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import generation
from madformer_jax.training import train_step
from tests import QUICK, tiny
from tests.support import worker

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12


def settings():
    c = tiny.get_config("plain")
    c.mesh.data = c.mesh.fsdp = 2
    c.train.steps, c.train.log_every, c.train.checkpoint_every = STEPS, 1, 2
    c.evaluate.n = c.train.evaluate_n = 13
    c.train.evaluate_every = STEPS
    return c


def start(workdir, *flags, **environment):
    """Runs two processes with launch/local.sh to their end; four devices in all. Returns its exit status and what it printed."""
    c = settings()
    names = ("mesh.data", "mesh.fsdp", "train.steps", "train.log_every", "train.checkpoint_every")
    names += ("evaluate.n", "train.evaluate_n")
    done = subprocess.run(
        ["launch/local.sh", "2", "--grace=1", "--", "--config=tests/tiny.py:plain", f"--workdir={workdir}"]
        + [f"--config.{name}={c[name.split('.')[0]][name.split('.')[1]]}" for name in names]
        + [*flags],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
            "MADFORMER_COMMAND": f"{sys.executable} -u -m tests.support.worker",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def losses(workdir):
    """Step -> all losses in metrics.jsonl."""
    found = {}
    for line in map(json.loads, (workdir / "metrics.jsonl").open()):
        if "loss" in line:
            found.setdefault(line["step"], []).append(line["loss"])
    return found


def tensorboard_losses(workdir):
    """Step -> all losses in TensorBoard's files."""
    found = {}
    for file in workdir.glob("events.out.*"):
        events = EventAccumulator(str(file), {"tensors": 0}).Reload()  # 0: all of them
        for event in events.Tensors("loss"):
            found.setdefault(event.step, []).append(float(tensor_util.make_ndarray(event.tensor_proto)))
    return found


def final(workdir):
    """Step, parameters and data state of the newest checkpoint."""
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    target = generation.abstract_params(train_step.make_setup(tiny.get_config("plain")).model, mesh)
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        step, trees, data = checkpoints.restore({"params": target}, data=True)
    return step, jax.device_get(trees["params"]), data


def samples(workdir):
    (folder,) = (workdir / "samples").glob(f"step_{STEPS:06d}_*_n5_*")
    return generation.SampleBatch(*map(np.concatenate, zip(*generation.read_shards(folder), strict=True)))


def put_classifier(workdir):
    """One that has learned nothing: what is compared are the scores of one process and of several."""
    params = classifier.init(jax.random.key(0), classes=10, channels=1)
    classifier.save(workdir / "classifier.npz", classifier.Classifier(params, 10, 1, accuracy=0.1, held_out=1))


def judged(workdir):
    """Every score of --mode=evaluate, those of the training's end, and the features of the reference."""
    (path,) = (workdir / "evaluations").glob("*.json")
    scores = {name: score["value"] for name, score in json.loads(path.read_text())["scores"].items()}
    (aside,) = (line for line in map(json.loads, (workdir / "metrics.jsonl").open()) if "scored" in line)
    with np.load(workdir / "reference.npz") as file:
        return scores, aside, file["features"]


def put_images(workdir):
    images = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 1), dtype=np.uint8)
    np.savez(workdir / "few.npz", images=images)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The same run in this process, with all four devices."""
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *a: devices)
    put_classifier(tmp_path / "alone")
    for mode in (reference, train, sample, evaluate):
        mode.run(settings(), str(tmp_path / "alone"))
    return tmp_path / "alone"


@pytest.mark.slow
def test_processes_train_and_sample_as_one_whatever_happens_to_them_and_write_once(tmp_path, alone):
    """The run passes through three pairs of processes.

    The first starts it, and one of its processes is killed at step 5. The second resumes it, and one of
    its processes receives SIGTERM. The third finishes it and samples. This process reads their checkpoints.
    """
    workdir = tmp_path / "run"
    status, output = start(workdir, MADFORMER_SIGNAL="1:5:KILL")
    assert status == 128 + 9, output
    saved = final(workdir)[0]
    assert saved in (2, 4)  # that of step 4 may still have been under way
    status, output = start(workdir, MADFORMER_SIGNAL="1:6:TERM")
    assert status == 0, output
    assert f"going on from step {saved}" in output
    stopped = final(workdir)[0]
    assert 6 <= stopped < STEPS, output
    put_classifier(workdir)
    put_images(workdir), put_images(alone)
    shutil.copy(alone / "reference.npz", workdir)  # which the processes make anew at their end
    flags = (f"--config.train.evaluate_every={STEPS}", "--config.train.log_to=tensorboard")
    status, output = start(workdir, *flags, MADFORMER_SAMPLE="1")
    assert status == 0, output
    assert f"going on from step {stopped}" in output

    last = tensorboard_losses(workdir)
    assert {step: len(values) for step, values in last.items()} == dict.fromkeys(range(stopped + 1, STEPS + 1), 1)
    written, expected = losses(workdir), losses(alone)
    assert sorted(written) == sorted(expected) == list(range(1, STEPS + 1))
    for step, (value,) in written.items():
        np.testing.assert_allclose(value, expected[step], rtol=1e-5)

    (step, params, data), (_, expected_params, expected_data) = final(workdir), final(alone)
    assert (step, data) == (STEPS, expected_data)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (params, expected_params))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)

    drawn, expected_drawn = samples(workdir), samples(alone)
    assert drawn.numbers.tolist() == list(range(5))
    np.testing.assert_array_equal(drawn.labels, expected_drawn.labels)
    np.testing.assert_allclose(drawn.latents, expected_drawn.latents, rtol=1e-3, atol=1e-3)
    names, expected_names = (
        sorted(p.name.split("_n5_")[0] for p in (folder / "samples").rglob("*")) for folder in (workdir, alone)
    )
    assert names == expected_names
    (scores, aside, features), (expected_scores, expected_aside, expected_features) = judged(workdir), judged(alone)
    assert scores == pytest.approx(expected_scores, rel=2e-3)
    assert aside == pytest.approx(expected_aside, rel=2e-3) and aside.items() >= {"step": STEPS, "scored": 13}.items()
    np.testing.assert_allclose(features, expected_features, rtol=1e-3, atol=1e-4)
    (path,) = (workdir / "few" / "evaluations").iterdir()
    expected = {name: score["value"] for name, score in worker.evaluate_few(settings(), str(alone)).items()}
    found = {name: score["value"] for name, score in json.loads(path.read_text())["scores"].items()}
    assert found == pytest.approx(expected, rel=2e-3)
