"""A sweep of one tiny run, with nothing replaced but the classifier's training."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from madformer_jax.evaluation import parts
from madformer_jax.models import classifier
from madformer_jax.modes import sweep as mode
from madformer_jax.testbed import sweep
from madformer_jax.testbed.sweep import Sweep
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def c(tmp_path):
    """Forty pictures of two classes."""
    for i in range(40):
        path = tmp_path / "data" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 128 + 127 * (i % 2), (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    c = tiny.get_config("plain")
    c.data.source, c.data.path, c.data.test_share = "folder", str(tmp_path / "data"), 0.5
    c.train.checkpoint_every, c.train.log_every = 2, 3
    c.sample.batch = c.evaluate.n = 12
    return c


@pytest.fixture
def file():
    definition = Sweep("Does it run?", [{"seed": 3}], {"steps": (2,), "passes": (2,)})
    module = types.ModuleType("one")
    module.__file__, module.sweep = "one.py", lambda: definition
    return types.SimpleNamespace(module=module, args=())


def sweep_of(c, file, folder):
    """Runs it to the end, with a classifier that is there."""
    params = classifier.init(jax.random.key(0), classes=2, channels=1)
    trained = classifier.Classifier(params, 2, 1, accuracy=0.5, held_out=8)
    path = folder / "judges" / sweep.judge_of(c) / "classifier.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    classifier.save(str(path), trained)
    return mode.run(c, str(folder), file=file)


def test_judged_again_after_an_interruption_the_result_is_the_same_bytes(c, file, tmp_path, monkeypatch):
    monkeypatch.setattr(mode, "SETTLE", 0.0)
    (name,) = sweep_of(c, file, tmp_path)["runs"]
    run = tmp_path / "runs" / name
    result = json.loads((run / "result.json").read_text())
    assert [point["step"] for point in result["training"]["curve"]] == [3, 6]
    assert [e["cost"]["solver_steps"] for e in result["evaluations"]] == [2, 2]
    assert result["evaluations"][0]["scores"] == result["evaluations"][1]["scores"]
    assert result["evaluations"][0]["scores"]["KID-classifier"]["low"] is not None
    assert len(json.loads((run / "seconds.json").read_text())["evaluations"]) == 2
    with Image.open(run / "grid.png") as grid:
        assert grid.size == (mode.COLUMNS * 32, 32)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["6"]

    files = [run / "result.json", run / "grid.png"]
    before = [path.read_bytes() for path in files]
    for path in (*files, *(run / "evaluations").iterdir()):
        path.unlink()
    monkeypatch.setattr(mode.train, "run", None)
    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep_of(c, file, tmp_path)
    patched = mode.evaluate.drawing.batches
    monkeypatch.setattr(
        mode.evaluate.drawing, "batches", lambda *args, **options: calls.append(args) or patched(*args, **options)
    )
    calls = []
    sweep_of(c, file, tmp_path)
    assert len(calls) == 1  # of the grid: the images that were judged are not drawn again
    assert [path.read_bytes() for path in files] == before


def interrupted(self):
    raise KeyboardInterrupt
