import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import QUICK

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_every_mode_works_in_a_bucket(tmp_path):
    """Trains, is killed while it saves, resumes, exports, samples, evaluates and prepares.

    All of it runs in a process that may fork (see tests/support/cloud.py).
    """
    command = [sys.executable, "-m", "tests.support.cloud", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": QUICK}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert found["ends"] == {
        "killed": -9, "resumed": 0, "export": 0, "exported": 0, "reference": 0, "evaluate": 0, "damaged": 0, "tokenizer": 0,
        "prepare": 0, "no_bucket": 2,
    }, logs  # fmt: skip
    assert not any("Traceback" in log for log in logs.values()), logs
    assert "going on from step 2 of gs://bucket/run" in logs["resumed"]
    assert "the checkpoint of step 4 in gs://bucket/run/checkpoints cannot be used: 4/ema/ocdbt" in logs["damaged"]
    assert logs["no_bucket"].splitlines()[-1].startswith("error: --workdir=gs://nobucket/run cannot be written: ")
    objects = found["objects"]
    written = {"/".join(name.split("/")[:3]) for name in objects if not name.endswith("/")}
    assert {
        "run/config.json",
        "run/metrics.jsonl",
        "run/export/config.json",
        "words/tokenizer.json",
        "data/manifest.json",
    } <= written
    for step, folder in ((4, "run/export/samples"), (2, "run/samples")):
        files = [name.rpartition("/")[2] for name in objects if name.startswith(f"{folder}/step_{step:06d}_ema_")]
        assert sorted(files) == ["grid.png", "protocol.json", "shard-00000-of-00001.npz"]
    assert not [name for name in objects if "part" in name or name.endswith("lock.json")]
    assert not found["failures"]  # each was met, and got over
    assert {path.name for path in tmp_path.iterdir()} == {"cache", *(f"{name}.log" for name in logs)}  # no folder "gs:"
