"""Tests of the Python interface to a trained model."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import madformer_jax
from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import sample
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import generation, prompts, trained_model
from tests import tiny
from tests.small import random_params

NAMES = ["cat", "dog", "7"]


def saved(c, workdir, names=NAMES):
    meta = {"step": 6, "data": {"names": names}, **text.tokenizer_identity(c)}
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(6, {"ema": random_params(madformer.build(c))}, None, meta)
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
    (shard,) = generation.read_shards(folder)
    np.testing.assert_array_equal(images, shard.images)
    assert (model.sample(3, labels=["dog", "cat"], seed=6) != images).any()
    with Image.open(f"{folder}/film.webp") as film, Image.open(f"{folder}/grid.png") as grid:
        # One block of two steps; images of a film are enlarged.
        assert (film.n_frames, film.size) == (2, (4 * grid.width, 4 * grid.height))
        film.seek(1)
        shown = np.asarray(film.convert("L")).reshape(grid.height, 4, grid.width, 4).mean(axis=(1, 3))
        assert np.abs(shown - np.asarray(grid)).mean() < 8  # The film has lossy compression.
    assert len(model._programs) == 1  # Another seed needs no other program.


def test_a_guide_draws_in_samples_and_streams_and_counts_in_costs(tmp_path, one_device):
    guide = tiny.get_config("plain")
    guide.model.classes, guide.model.mlp_width, guide.train.ema_decay = 3, 8, 0.5
    c = tiny.get_config("plain")
    c.model.classes, c.sample.n, c.sample.guidance, c.seed = 3, 2, 3.0, 1
    c.sample.guide = saved(guide, tmp_path / "guide")
    workdir = saved(c, tmp_path / "run")
    model = madformer_jax.load(workdir)
    images = model.sample(2)
    *_, last = model.stream(2)
    assert np.abs(last.images.astype(int) - images).max() <= 1
    folder = pathlib.Path(sample.run(c, workdir)["folder"])
    np.testing.assert_array_equal(next(generation.read_shards(folder)).images, images)
    protocol = json.loads((folder / "protocol.json").read_text())
    assert protocol["guide"]["step"] == 6 and protocol["guide"]["fingerprint"] != protocol["fingerprint"]
    newer = jax.tree.map(lambda x: x / 2, random_params(madformer.build(guide)))
    with checkpoint.Checkpoints(c.sample.guide, 2) as checkpoints:
        checkpoints.save(7, {"ema": newer}, None, {"step": 7, "data": {"names": NAMES}})
    assert (madformer_jax.load(workdir).sample(2) != images).any()  # the newest checkpoint guides
    np.testing.assert_array_equal(madformer_jax.load(workdir, guide_step=6).sample(2), images)
    alone = model.sample(2, guidance=1)
    assert (alone != images).any()
    # Both models run all of their layers once at each of two steps; only one image is decoded.
    both, one = model.cost(), model.cost(guidance=1)
    assert (both.nfe, one.nfe) == (4, 2) and both.passes == last.passes == 2 * one.passes
    assert one.flops < both.flops < 2 * one.flops


def test_loading_chooses_the_weights_or_refuses_in_one_line(tmp_path, one_device):
    c = tiny.get_config("plain")
    raw = random_params(madformer.build(c))
    with checkpoint.Checkpoints(str(tmp_path / "run"), 2) as checkpoints:
        for step in (3, 6):
            ema = jax.tree.map(lambda x, step=step: x * step, raw)
            checkpoints.save(step, {"ema": ema, "params": raw}, None, {"step": step, "data": {"names": []}})
    checkpoint.write_config(c, str(tmp_path / "run"))
    run = str(tmp_path / "run")
    averaged, earlier, other = (
        madformer_jax.load(run, **x) for x in ({}, {"step": 3}, {"weights": "raw", "step": "3"})
    )
    assert not _same(averaged.params, earlier.params) and not _same(earlier.params, other.params)
    assert _same(other.params, raw)
    for settings, message in (
        ({"weight": "raw"}, "weight='raw': 'weight' is not a setting of loading. Did you mean 'weights'?"),
        ({"weights": "best"}, "config.sample.weights='best'"),
        ({"step": 4}, "step 4"),
        ({"ema": 0.05}, "needs a training with config.train.ema_snapshots"),
        ({"guide": tmp_path / "none"}, "none/config.json does not exist"),
        ({"guidance": 2.0}, "'guidance' is not a setting of loading"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as error:
            madformer_jax.load(run, **settings)
        assert "\n" not in str(error.value)


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory):
    c, devices = tiny.get_config(), jax.devices()[:1]
    c.model.classes, c.model.depth, c.model.unet_attention = 3, 2, (False,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: devices)
        return madformer_jax.load(saved(c, tmp_path_factory.mktemp("model")))


@pytest.fixture
def model(shared_model, one_device):
    """A model with its usual config, whose programs the tests share."""
    config = shared_model.config.copy_and_resolve_references()
    yield shared_model
    shared_model.config = config


def test_a_stream_ends_with_the_images_of_a_sample(model, tmp_path):
    """Heun's two evaluations are one step of the stream."""
    settings = {"labels": [2, 0], "guidance": 1.7, "steps": 3, "seed": 1, "solver": "heun"}
    images = model.sample(**settings)
    frames = list(model.stream(every="step", **settings))
    assert [(frame.block, frame.step) for frame in frames] == [
        (block, step) for block in range(4) for step in (1, 2, 3)
    ]
    assert np.abs(frames[-1].images.astype(int) - images).max() <= 1
    model.config.sample.solver = "heun"
    cost = model.cost(steps=3, guidance=1.7)
    assert frames[-1].passes == pytest.approx(cost.passes)
    assert cost.passes == pytest.approx(cost.nfe + 2 * 3 / 4)  # plus the clean tower in both branches
    first_block = slice(16), slice(16)
    for frame in frames[3:]:
        np.testing.assert_array_equal(frame.images[:, *first_block], frames[2].images[:, *first_block])
    assert (frames[0].images[:, *first_block] != frames[2].images[:, *first_block]).any()
    assert (frames[2].images[:, 16:] == 128).all()  # not drawn yet
    np.save(
        tmp_path / "noise.npy", np.random.default_rng(0).standard_normal((2, *derive_sizes(model.config).block_shape))
    )
    others = settings | {"noise": str(tmp_path / "noise.npy"), "solver": "ancestral", "steps_by_block": "4,3,1,1"}
    *_, last = model.stream(**others)
    model.config.sample.solver = "ancestral"
    assert last.passes == pytest.approx(model.cost(guidance=1.7, steps_by_block="4,3,1,1").passes)
    assert np.abs(last.images.astype(int) - model.sample(**others)).max() <= 1
    assert (last.images != images).any()
    whole = list(model.stream(**settings))
    assert [frame.block for frame in whole] == [0, 1, 2, 3]
    np.testing.assert_array_equal(whole[-1].images, frames[-1].images)


def test_wrong_settings_raise_one_line_before_drawing(model):
    with pytest.raises(ConfigError, match="use `sample`, not `sample_latents`"):
        model.sample_latents()
    for settings, message in (
        ({"labels": [3]}, "3 is not a class"),
        ({"labels": ["cow"]}, "'cow' is neither"),
        ({"labels": ["cat,dog"]}, "'cat,dog' is neither"),
        ({"labels": []}, "holds no label"),
        ({"labels": True}, "must be a class number"),
        ({"labels": [0, 1, 2], "n": 2}, "there are 3 of them for n=2 images"),
        ({"labels": "cat,dog", "n": 1}, "there are 2 of them for n=1 images"),
        ({"label": 3}, "label=3: 'label' is not a setting of sampling. Did you mean 'labels'?"),
        ({"Seed": 3}, "Did you mean 'seed'?"),
        ({"n": 1.5}, "n=1.5 must be a whole number"),
        ({"n": 0}, "config.sample.n=0"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"seed": -1}, "config.seed=-1"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"steps": "many"}, "steps='many' must be a whole number"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"guidance": 10**400}, "must be a number"),
        ({"solver": 3}, "solver=3 must be a text"),
        ({"guidance_interval": 3}, "guidance_interval=3 must be whole numbers"),
        ({"guidance_interval": ("a", 3)}, "must be whole numbers"),
        ({"steps": 1, "solver": "ddim", "spacing": "leading"}, "starts at t = 0 and returns noise"),
        ({"prompts": 3}, "prompts=3 must be a text"),
        ({"prompts": ["a red planet"]}, "needs a model that reads captions"),
        ({"evry": "step"}, "Did you mean 'every'?"),
        ({"stepz": 3}, "is not a setting of sampling"),
        ({"steps": 0}, "steps"),
        ({"guidance": "much"}, "guidance='much'"),
        ({"weights": "raw"}, r"load\(path, weights='raw'\)"),
        ({"film": "webp"}, "'film' is not a setting of sampling"),
        ({"every": "pixel"}, "'block' or 'step'"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            model.stream(**settings)
        assert "\n" not in str(error.value)


def test_numpy_numbers_and_texts_of_numbers_are_accepted(model):
    plain = model.sample(labels=[1], steps=2, seed=3, guidance=2.0)
    other = model.sample(
        np.int64(1),
        labels=np.int64(1),
        steps="2",
        seed=np.uint32(3),
        guidance=np.float32(2),
        guidance_interval=[0, 999],
    )
    np.testing.assert_array_equal(other, plain)
    np.testing.assert_array_equal(model.sample(labels="dog", steps=np.int16(2), seed=jnp.int32(3), guidance="2"), plain)
    assert len(model.sample(labels="cat,dog", steps=2)) == 2
    assert len(model.sample(2, labels=range(3), steps=2, label_sampling="random")) == 2


def test_class_names_that_are_numbers_are_still_names(tmp_path, one_device, capsys):
    c = tiny.get_config("plain")
    c.model.classes, c.sample.n = 12, 1
    names = [str(k) for k in (1, 10, 11, 12, *range(2, 10))]
    model = madformer_jax.load(saved(c, tmp_path, names))
    drawn = model.sample(labels=range(12))
    for name, number in (("2", 4), ("1", 0), ("12", 3), ("10", 1)):
        np.testing.assert_array_equal(model.sample(12, labels=[name])[number], drawn[number])
        assert (model.sample(12, labels=[name])[0] != drawn[0]).any() or not number
        np.testing.assert_array_equal(model.sample(12, labels=[number])[number], drawn[number])
    args = ["main", "--mode=sample", f"--workdir={tmp_path}", "--config.sample.labels=2"]
    assert command_line.main(args) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert """Write '["2"]' for the name or '[2]' for the number""" in line
    assert not (tmp_path / "samples").exists()
    for label, number in (('["2"]', 4), ("[2]", 2)):
        c.sample.labels = label
        folder = pathlib.Path(sample.run(c, str(tmp_path))["folder"])
        assert next(generation.read_shards(folder)).labels.tolist() == [number]
        protocol = json.loads((folder / "protocol.json").read_text())
        assert (protocol["labels"], protocol["classes"]) == (str(number), {str(number): names[number]})


def test_docstrings_list_every_setting():
    for function, names in (
        (madformer_jax.load, trained_model._LOAD_FIELDS),
        (
            trained_model.Model.sample,
            set(schema.base().sample) - {"n", *trained_model._LOAD_FIELDS, *trained_model._FILE_FIELDS},
        ),
    ):
        missing = [name for name in names if f"- {name}: " not in function.__doc__]
        assert not missing, f"{function.__name__}: {missing}"


def test_repr_describes_the_model(model):
    assert repr(model) == (
        "<madformer_jax.Model: 32 x 32 x 1 images; 3 classes: cat, dog, 7; 2 layers, 1 of them diffusion layers; 4 blocks; "
        "24,296 parameters>"
    )


def test_guidance_without_label_dropout_warns_once(model, caplog):
    model.config.train.label_dropout = 0.0
    for _ in range(2):
        model.cost(steps=2, guidance=3.0)
    assert [line for line in caplog.messages if "config.train.label_dropout=0" in line] == [
        "config.sample.guidance=3 with config.train.label_dropout=0: the model never trained without a label, so that guidance "
        "extrapolates from an untrained token. Use config.sample.guidance=1, or train with config.train.label_dropout=0.1."
    ]
    caplog.clear()
    model.cost(steps=2, guidance=1.0)
    assert not caplog.messages


def test_prompts_of_python_are_literal(tmp_path, one_device):
    """No prompt names a file or a split, so that a page can pass on the text of a visitor."""
    c = tiny.get_config("plain")
    c.text.tokenizer, c.text.length, c.sample.n = "drawings", 40, 2
    c.text.vocabulary = text.open_tokenizer("drawings").vocabulary
    (tmp_path / "secret.txt").write_text("hunter two")
    model = madformer_jax.load(saved(c, tmp_path))
    for prompt in (str(tmp_path / "secret.txt"), str(tmp_path / "missing.txt"), "data:test", "a; b", '["a"]'):
        for value in (prompt, [prompt], (np.str_(prompt),)):
            settings = model._settings(None, {"prompts": value})
            assert prompts.load(settings) == [prompt]
            assert settings.sample.n == 1
    frames = list(model.stream(prompts=["data:test", ""]))
    assert len(frames[-1].images) == 2
    with pytest.raises(ConfigError, match="prompts: there are 3 of them for n=2 images"):
        model.sample(2, prompts=["a", "b", "c"])
    with pytest.raises(ConfigError, match="holds no prompt"):
        model.sample(prompts=[])
    for wrong, message in ((["a", 3], "3 must be a text"), (np.array("a"), "must be a text or a list")):
        with pytest.raises(ConfigError, match=message):
            model.sample(prompts=wrong)
    c.sample.prompts = '["a; b", "x.txt"]'  # the value of --config.sample.prompts
    assert prompts.load(c) == ["a; b", "x.txt"]


def test_missing_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"config.json does not exist: give the workdir"):
        madformer_jax.load(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="the folder owner/model does not exist; .* pip install huggingface_hub"):
        madformer_jax.load("owner/model")


def test_codec_argument_replaces_the_vae_of_the_config(tmp_path, one_device):
    """The path of the VAE in a config of another user is ignored."""
    c = tiny.get_config()
    c.codec.name, c.codec.path, c.data.image_size, c.data.channels = "vae", str(tmp_path / "theirs"), 32, 3
    saved(c, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {
        "seed": 5
    }  # no longer the config that this user wrote
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="config.codec.path is empty"):
        madformer_jax.load(str(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine is not a VAE folder"):
        madformer_jax.load(str(tmp_path), codec=str(tmp_path / "mine"))
