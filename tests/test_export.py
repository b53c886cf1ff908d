import json

import jax
import numpy as np
import pytest

from madformer_jax import checkpoint, export, generate, main, partitioning, train
from madformer_jax.config import ConfigError
from tests import tiny


@pytest.fixture
def plain():
    return tiny.get_config("plain")


def save_untrained(config, workdir):
    """A workdir with one checkpoint, step 3, whose averages differ from its parameters; returns the averages."""
    mesh = partitioning.make_mesh(1, 4, 2)
    s = train.setup(config)
    create, _ = train.create_state(s.model, s.tx, config.seed, mesh)
    state = create()
    arrays = {"params": state.params, "ema": jax.tree.map(lambda x: 1.5 * x, state.params), "opt": state.opt}
    checkpoint.write_config(config, workdir)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, arrays, {"next_batch": 3}, {"step": 3})
    return jax.device_get(arrays["ema"])


def test_an_export_holds_the_averages_alone_and_is_sampled_from(plain, tmp_path):
    config, whole, exported = plain, str(tmp_path / "run"), str(tmp_path / "run" / "export")
    config.sample.weights = "raw"
    ema = save_untrained(config, whole)
    config.mesh.data, config.mesh.fsdp = 2, 4  # another mesh than that of the save
    export.run(config, whole)
    assert {p.name for p in (checkpoint.folder(exported) / "3").iterdir()} >= {"ema", "meta"}
    assert not {p.name for p in (checkpoint.folder(exported) / "3").iterdir()} & {"params", "opt", "data"}
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    target = generate.abstract_params(train.setup(config).model, mesh)
    with checkpoint.Checkpoints(exported, read_only=True) as checkpoints:
        step, trees, _ = checkpoints.restore({"ema": target})
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, trees["ema"], ema)

    args = ["main", "--mode=sample", f"--workdir={exported}", "--config.sample.n=3"]  # its own config.json will do
    assert main.main(args) == 0
    (file,) = (tmp_path / "run" / "export" / "samples").glob("step_000003_ema_*_n3.npz")
    assert len(np.load(file)["images"]) == 3


def test_training_does_not_go_on_from_an_export(plain, tmp_path):
    save_untrained(plain, str(tmp_path))
    export.run(plain, str(tmp_path))
    plain.mesh.data = 8
    with pytest.raises(ConfigError, match="step 3 holds no params, opt, data, only ema"):
        train.run(plain, str(tmp_path / "export"))


def test_a_second_export_takes_the_place_of_the_first(plain, tmp_path):
    save_untrained(plain, str(tmp_path))
    export.run(plain, str(tmp_path))
    export.run(plain, str(tmp_path))
    newer, older = checkpoint.folder(str(tmp_path)), checkpoint.folder(str(tmp_path / "export"))
    (newer / "3").rename(newer / "4")
    export.run(plain, str(tmp_path))
    assert [p.name for p in older.iterdir() if p.name.isdigit()] == ["4"]
    assert json.loads((tmp_path / "export" / "config.json").read_text())["sample"]["weights"] == "ema"
