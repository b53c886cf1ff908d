"""Models of latents with other than 4 channels, from training to sampling: SD3's kind of VAE, and latents without a VAE."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madformer_jax
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.modes import export, sample, train
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import codec, generation
from madformer_jax.training import train_step
from madformer_jax.weights import state_dicts
from tests import tiny
from tests.small import random_params

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"


@pytest.fixture
def c(one_device):
    c = tiny.get_config("plain")
    c.train.steps = c.train.checkpoint_every = 1
    c.train.log_every, c.train.batch = 1, 2
    c.sample.n = c.sample.batch = c.sample.grid = 2
    return c


def write_vae(folder, form):
    """Writes a model of the reference arrays as a diffusers folder."""
    folder.mkdir()
    with np.load(REFERENCE / f"vae_{form}.npz") as file:
        (folder / "config.json").write_text(str(file["config"]))
        state = {name.removeprefix("param/"): file[name] for name in file.files if name.startswith("param/")}
    state_dicts.write_state_dict(folder / "diffusion_pytorch_model.safetensors", state)
    return str(folder)


def test_a_model_of_16_channels_with_a_shift_trains_exports_and_samples(c, tmp_path, monkeypatch):
    """The training step is traced only. The sampler returns its noise, which the VAE decodes."""
    c.codec.name, c.codec.path, c.codec.latent_channels = "vae", write_vae(tmp_path / "vae", "sd3"), 16
    c.data.channels = 3
    run, auto = str(tmp_path / "run"), c.copy_and_resolve_references()
    codec.resolve_scale(c, None)
    assert (c.codec.scaling_factor, c.codec.shift_factor) == (1.5305, 0.0609)
    s, mesh = train_step.make_setup(c), partitioning.make_mesh(1, 1, 1)
    batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "label": np.zeros(2, np.int32)}
    state, vae = train_step.create_state(s.model, s.tx, c.seed, mesh)[1], s.codec.load()
    with partitioning.scope(mesh):
        metrics = jax.eval_shape(train_step.make_step(s, c), state, batch, vae, np.uint32(0))[1]
    assert metrics["loss"].shape == ()

    with checkpoint.Checkpoints(run) as checkpoints:
        checkpoints.save(1, {"ema": random_params(s.model)}, None, {"step": 1})
    checkpoint.write_config(c, run)
    monkeypatch.setattr(generation.sampler, "sample", lambda model, params, noise, tokens, **settings: noise)
    (shard,) = generation.read_shards(sample.run(c, export.run(c, run)["export"])["folder"])
    assert shard.latents.shape == (2, 4, 4, 16)
    decoded = codec.build(c).decode(vae, jnp.asarray(shard.latents))
    assert np.abs(generation.to_uint8(decoded).astype(int) - shard.images).max() <= 1

    auto.codec.path = write_vae(tmp_path / "other", "flux")
    with pytest.raises(ConfigError, match=r"scaling_factor=1.5305, but the VAE at .*other.* has 0.3611"):
        sample.run(auto, run)


@pytest.fixture
def latents(c, tmp_path):
    """Writes 12 latents 4 x 4 x 5 of two classes and returns a config that reads them."""
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "latents" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i}.npy", rng.normal(3, 0.5, (4, 4, 5)).astype(np.float16 if i % 3 else np.float32))
    c.data.source, c.data.path, c.data.split = "npy", str(tmp_path / "latents"), "all"
    c.codec.name, c.codec.latent_channels = "external", 5
    c.codec.scaling_factor, c.codec.shift_factor = 2.0, 3.0
    c.data.channels, c.model.classes = 3, 2
    return c


def test_a_folder_of_latents_trains_a_model_whose_samples_are_latents(latents, tmp_path):
    run, latents.model.classes = str(tmp_path / "run"), 0  # a smaller program
    train.run(latents, run, grids=False)
    folder = pathlib.Path(sample.run(latents, run)["folder"])
    (shard,) = generation.read_shards(folder)
    drawn = np.load(folder / "latents.npy")
    assert drawn.shape == (2, 4, 4, 5)
    np.testing.assert_allclose((drawn - 3) * 2, shard.latents, atol=1e-5)
    assert shard.images.shape == (2, 4, 4, 3)  # the preview
    model = madformer_jax.load(run)
    np.testing.assert_array_equal(model.sample_latents(2), drawn)
    np.testing.assert_array_equal(model.sample(2), shard.images)


def test_latents_keep_their_classes_and_values(latents):
    batch = next(pipeline.train_iterator(latents, batch=12))
    assert np.bincount(batch["label"]).tolist() == [6, 6]
    assert batch["mean"].shape == (12, 4, 4, 5)
    file = np.load(f"{latents.data.path}/a/0.npy")
    assert (batch["mean"] == file).all((1, 2, 3)).sum() == 1
    assert pipeline.dataset_info(latents).image_shape == (4, 4, 5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("codec.latent_channels", 4, "holds latents of 4 x 4 x 5 values, and the model takes 4 x 4 x 4"),
        ("data.flip", True, "latents cannot be flipped"),
        ("codec.name", "pixel", "codec.name='pixel', but .* holds latents"),
        ("data.source", "digits", "codec.name='external' needs latents, and config.data.source=digits holds images"),
    ],
)
def test_latents_that_do_not_fit_are_refused_in_one_line(latents, field, value, words):
    latents.model.classes = 0
    latents.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=words) as error:
        pipeline.dataset_info(latents)
    assert "\n" not in str(error.value)


BROKEN_HEADER = b"\x93NUMPY\1\0\6\0{'a':\n"
ARCHIVE = b"PK\5\6" + bytes(18)  # an empty .npz


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((4, 4, 6)),
        np.full((4, 4, 5), np.nan),
        np.full((4, 4, 5), 1e99),
        np.zeros((4, 4, 5), int),
        b"no",
        BROKEN_HEADER,
        ARCHIVE,
    ],
)
def test_a_file_that_is_no_such_latent_is_passed_over_by_name(latents, content, caplog):
    path = pathlib.Path(latents.data.path) / "b" / "3.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    latents.data.max_corrupt = 0.1
    batch = next(pipeline.train_iterator(latents, batch=12))
    assert batch["mean"].shape == (12, 4, 4, 5)
    assert f"skipped unreadable record {path}: " in caplog.text
