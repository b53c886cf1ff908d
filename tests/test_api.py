"""The Python interface: a trained model as an object."""

import json

import numpy as np
import pytest
from PIL import Image

import madformer_jax
from madformer_jax import drawing
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import sample
from madformer_jax.runtime import checkpoint
from madformer_jax.sizes import sizes_of
from tests import tiny
from tests.small import random_params

NAMES = ["cat", "dog", "7"]


def saved(c, workdir):
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(6, {"ema": random_params(madformer.build(c))}, None, {"step": 6, "data": {"names": NAMES}})
    checkpoint.write_config(c, str(workdir))
    return str(workdir)


def test_a_model_draws_the_images_of_mode_sample(tmp_path, one_device):
    c = tiny.get_config("plain")
    c.model.classes, c.sample.n, c.sample.labels, c.seed = 3, 3, "1,0", 5
    workdir = saved(c, tmp_path)
    model = madformer_jax.load(workdir)
    assert model.labels == tuple(NAMES) and model.config.sample.steps == 2
    images = model.sample(3, labels=["dog", "cat"])
    c.sample.film = "webp"
    folder = sample.run(c, workdir)["folder"]
    (shard,) = drawing.read_shards(folder)
    np.testing.assert_array_equal(images, shard.images)
    assert (model.sample(3, labels=["dog", "cat"], seed=6) != images).any()
    with Image.open(f"{folder}/film.webp") as film, Image.open(f"{folder}/grid.png") as grid:
        assert (film.n_frames, film.size) == (2, (4 * grid.width, 4 * grid.height))  # one block of two steps, enlarged
        film.seek(1)
        shown = np.asarray(film.convert("L")).reshape(grid.height, 4, grid.width, 4).mean(axis=(1, 3))
        assert np.abs(shown - np.asarray(grid)).mean() < 8  # but for its compression
    assert len(model._programs) == 1  # another seed is no other program


@pytest.fixture
def model(tmp_path, one_device):
    c = tiny.get_config()
    c.model.classes, c.model.depth, c.model.unet_attention = 3, 2, (False,)
    return madformer_jax.load(saved(c, tmp_path))


def test_a_stream_ends_with_the_images_of_a_sample(model, tmp_path):
    settings = {"labels": [2, 0], "guidance": 1.7, "steps": 3, "seed": 1}
    images = model.sample(**settings)
    frames = list(model.stream(every="step", **settings))
    assert [(frame.block, frame.step) for frame in frames] == [
        (block, step) for block in range(4) for step in (1, 2, 3)
    ]
    assert np.abs(frames[-1].images.astype(int) - images).max() <= 1
    cost = model.cost(steps=3, guidance=1.7)
    assert frames[-1].passes == pytest.approx(cost.passes)
    assert cost.passes == pytest.approx(cost.nfe + 2 * 3 / 4)  # the clean tower, in both branches
    at = slice(16), slice(16)  # of the first block
    for frame in frames[3:]:
        np.testing.assert_array_equal(frame.images[:, *at], frames[2].images[:, *at])
    assert (frames[0].images[:, *at] != frames[2].images[:, *at]).any()
    assert (frames[2].images[:, 16:] == 128).all()  # nothing yet
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).standard_normal((2, *sizes_of(model.config).block_shape)))
    *_, last = model.stream(**settings, noise=str(tmp_path / "noise.npy"))
    assert np.abs(last.images.astype(int) - model.sample(**settings, noise=str(tmp_path / "noise.npy"))).max() <= 1
    assert (last.images != images).any()
    whole = list(model.stream(**settings))
    assert [frame.block for frame in whole] == [0, 1, 2, 3]
    np.testing.assert_array_equal(whole[-1].images, frames[-1].images)


def test_a_wrong_setting_is_one_line_before_anything_is_drawn(model):
    for settings, message in (
        ({"labels": [3]}, "3 is no class"),
        ({"labels": ["cow"]}, "'cow' is neither"),
        ({"labels": ["cat,dog"]}, "holds a ','"),
        ({"prompts": ["a red planet"]}, "needs a model that reads captions"),
        ({"stepz": 3}, "no such setting"),
        ({"steps": 0}, "steps"),
        ({"guidance": "much"}, "guidance='much'"),
        ({"weights": "raw"}, "chosen when it was loaded"),
        ({"every": "pixel"}, "'block' or 'step'"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.stream(**settings)


def test_what_is_no_model_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no .*config.json: give the workdir"):
        madformer_jax.load(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="there is no folder owner/model; .* pip install huggingface_hub"):
        madformer_jax.load("owner/model")


def test_a_vae_can_be_given_where_a_config_names_none(tmp_path, one_device):
    """The folder of an export's own VAE means nothing elsewhere."""
    c = tiny.get_config()
    c.codec.name, c.codec.path, c.data.image_size, c.data.channels = "vae", str(tmp_path / "theirs"), 32, 3
    saved(c, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"seed": 5}  # no longer ours
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="config.codec.path is empty"):
        madformer_jax.load(str(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine is no VAE folder"):
        madformer_jax.load(str(tmp_path), codec=str(tmp_path / "mine"))
