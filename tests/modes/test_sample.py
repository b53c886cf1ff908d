import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import sample
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import generation
from tests import tiny
from tests.small import random_params

NAMES = ["cat", "dog", "7"]


@pytest.fixture
def c():
    c = tiny.get_config("plain")
    c.model.classes = 3
    c.sample.n, c.sample.batch, c.sample.shard, c.sample.grid = 7, 2, 3, 5
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with checkpoints of two steps and class names."""
    workdir, c = tmp_path_factory.mktemp("sample"), tiny.get_config("plain")
    c.model.classes = 3
    params = random_params(madformer.build(c))
    with checkpoint.Checkpoints(str(workdir), keep=2) as checkpoints:
        for step in (4, 6):
            ema = jax.tree.map(lambda x, step=step: step * x, params)
            checkpoints.save(step, {"ema": ema}, None, {"step": step, "data": {"names": NAMES}})
    checkpoint.write_config(c, str(workdir))
    return workdir


@pytest.fixture
def workdir(trained, tmp_path, one_device, monkeypatch):
    """A copy of `trained`, with a sampler that returns its noise."""
    monkeypatch.setattr(generation.sampler, "sample", lambda model, params, noise, tokens, **settings: noise)
    return shutil.copytree(trained, tmp_path / "run")


def test_images_are_in_numbered_shards_with_a_protocol(c, workdir):
    c.sample.labels = "2,0"
    figures = sample.run(c, str(workdir))
    (folder,) = (workdir / "samples").iterdir()
    assert figures.pop("seconds") > 0
    assert figures == {"folder": str(folder), "step": 6, "n": 7, "drawn": 7}
    assert sorted(path.name for path in folder.iterdir()) == [
        "grid.png", "protocol.json", *(f"shard-0000{k}-of-00003.npz" for k in range(3))
    ]  # fmt: skip
    shards = list(generation.read_shards(folder))
    assert [shard.numbers.tolist() for shard in shards] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [shard.labels.tolist() for shard in shards] == [[2, 0, 2], [0, 2, 0], [2]]
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (3 * 32, 2 * 32)  # 5 images
        np.testing.assert_array_equal(np.asarray(grid)[32:, :64], generation.tile_grid(shards[1].images[:2])[..., 0])
    protocol = json.loads((folder / "protocol.json").read_text())
    assert (protocol["labels"], protocol["model"]["classes"], protocol["image"]) == ("2,0", 3, [32, 32, 1])


def test_interrupted_sampling_continues(c, workdir, monkeypatch):
    whole = sample.run(c, str(workdir))["folder"]
    expected = {path.name: path.read_bytes() for path in (workdir / "samples").glob("*/shard-*")}
    shutil.rmtree(whole)

    def killed(path, batch):
        if batch.numbers[0] == 3:
            raise KeyboardInterrupt
        write(path, batch)

    write = generation.write_shard
    monkeypatch.setattr(generation, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        sample.run(c, str(workdir))
    monkeypatch.setattr(generation, "write_shard", write)
    (folder,) = (workdir / "samples").iterdir()
    (first,) = folder.glob("shard-*")
    written = first.stat().st_mtime_ns
    assert sample.run(c, str(workdir))["drawn"] == 4
    assert first.stat().st_mtime_ns == written
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected
    assert sample.run(c, str(workdir))["drawn"] == 0


def test_damaged_shard_is_not_read_and_is_drawn_again(c, workdir):
    folder = pathlib.Path(sample.run(c, str(workdir))["folder"])
    path = folder / "shard-00001-of-00003.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ConfigError, match="shard-00001-of-00003.npz is damaged .* draws it again"):
        list(generation.read_shards(folder))
    assert sample.run(c, str(workdir))["drawn"] == 3
    assert path.read_bytes() == whole
    path.unlink()
    with pytest.raises(ConfigError, match="holds 2 of 3 shards"):
        list(generation.read_shards(folder))


def test_every_setting_that_changes_the_images_changes_the_folder(c, tmp_path):
    def name(step=6, weights="a", vae=""):
        return sample._folder_name(c, sample._protocol(c, step, weights, vae))

    names = {name(), name(step=4), name(weights="b"), name(vae="c")}
    changes = {
        "seed": 1, "sample.labels": "1", "sample.clip_x0": 2.0, "sample.solver": "ddim", "sample.spacing": "leading",
        "sample.steps": 3, "sample.guidance": 2.0, "sample.guidance_schedule": "linear", "sample.guidance_interval": (5, 600),
        "sample.label_sampling": "random", "sample.weights": "raw", "sample.n": 8, "sample.shard": 4,
        "model.clean_timestep": "noisy", "codec.dtype": "bfloat16", "data.channels": 3,
    }  # fmt: skip
    for i, (field, value) in enumerate(changes.items(), 5):
        c.update_from_flattened_dict({field: value})
        names.add(name())
        assert len(names) == i, field
    c.sample.batch, c.sample.grid, c.mesh.fsdp, c.data.path = 3, 2, 2, "elsewhere"  # These do not change the images.
    assert name() in names
    c.data.channels, c.sample.noise = 1, str(tmp_path / "noise.npy")
    for value in (0.0, 1.0):
        np.save(c.sample.noise, np.full((8, 1, 64, 16), value))
        names.add(name())
    assert len(names) == 4 + len(changes) + 2
    c.seed += 1  # Even with given noise, the seed determines random labels.
    assert name() not in names and "_leading3_w2linear_t5-600_noise-noise_n8_" in name()


def test_retrained_model_is_sampled_to_another_folder(c, workdir):
    first = sample.run(c, str(workdir))["folder"]
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / "6")
    assert sample.run(c, str(workdir))["folder"] != first
    assert len(list((workdir / "samples").iterdir())) == 2


def test_step_can_be_chosen_and_fallback_is_logged_last(c, workdir, caplog):
    c.sample.step = 4
    assert sample.run(c, str(workdir))["step"] == 4
    c.sample.step = 5
    with pytest.raises(ConfigError, match="no checkpoint of step 5 in .*, only of 4, 6"):
        sample.run(c, str(workdir))
    c.sample.step = -1
    for path in (workdir / "checkpoints" / "6" / "ema").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    caplog.clear()
    assert sample.run(c, str(workdir))["step"] == 4
    assert "these images are of step 4: the newest checkpoint, of step 6, is damaged" in caplog.messages[-1]


def test_labels_may_be_class_names(c, workdir):
    c.sample.labels = "dog, 0,cat"
    folder = sample.run(c, str(workdir))["folder"]
    assert next(generation.read_shards(folder)).labels.tolist() == [1, 0, 0]
    c.sample.labels = "dgo"
    with pytest.raises(
        ConfigError, match=r"'dgo' is neither a class number nor a class name \(names are 'dog', \.\.\.\)"
    ):
        sample.run(c, str(workdir))


def test_errors_are_one_line_before_anything_is_written(c, workdir):
    c.data.image_size = 64
    with pytest.raises(ConfigError, match=r"config\.data\.image_size was 32 and is 64"):
        sample.run(c, str(workdir))
    c.data.image_size = 32
    c.sample.noise = str(workdir / "nothing.npy")
    with pytest.raises(ConfigError, match=r"nothing\.npy cannot be read"):
        sample.run(c, str(workdir))
    assert not (workdir / "samples").exists()
    c.sample.noise = ""
    (workdir / "samples").write_text("a file")
    with pytest.raises(ConfigError, match="samples/.* cannot be read: Not a directory") as error:
        sample.run(c, str(workdir))
    assert "\n" not in str(error.value)
