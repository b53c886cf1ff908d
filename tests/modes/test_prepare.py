"""--mode=prepare writes every good image once, even if it is killed."""

import json
import os
import resource
import signal

import jax
import numpy as np
import pytest

from madformer_jax.data import folder, pipeline, records
from madformer_jax.errors import ConfigError
from madformer_jax.modes import prepare
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec
from madformer_jax.training import train_step
from madformer_jax.weights import state_dicts, vae_weights
from tests import tiny
from tests.data.prepared import ENCODER, GOOD, ids, make_config, prepared, vae
from tests.support import kill_prepare

SDXL = ENCODER._replace(scaling_factor=0.13025)


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def test_prepared_images_equal_those_of_the_source_and_corrupt_ones_are_listed(config, out):
    prepare.run(config, out)
    assert ids(config, out) == GOOD
    read = [pixels for i in range(23) if (pixels := _read(config, i)) is not None]
    np.testing.assert_array_equal(records.Records(out).read(np.arange(21)).arrays["image"], read)
    manifest = records.read_manifest(out)
    assert [os.path.basename(name) for name, _ in manifest["skipped"]] == ["0004.png", "0009.png"]
    assert all(reason for _, reason in manifest["skipped"])
    assert manifest["records"] == 21 and sum(shard["skipped"] for shard in manifest["shards"]) == 2


def _read(config, index):
    source = pipeline.sources.open_source(config)
    try:
        return pipeline.make_preprocessor(config).process_batch(source.read(np.array([index])).arrays["image"])[0]
    except ValueError:
        return None


def test_more_corrupt_images_than_allowed_is_an_error(config, out):
    config.prepare.max_corrupt = 0.05
    with pytest.raises(ConfigError, match=r"2 of 23 images are corrupt.*max_corrupt=0.05.*0009.png"):
        prepare.run(config, out)
    with pytest.raises(ConfigError, match="holds no manifest.json"):
        pipeline.dataset_info(prepared(config, out))
    config.prepare.max_corrupt = 0.1
    prepare.run(config, out)
    assert ids(config, out) == GOOD


def test_a_shard_of_corrupt_images_only_is_empty(config, out, tmp_path):
    for i in range(0, 10, 2):
        os.truncate(tmp_path / "images" / "0" / f"{i:04}.png", 45)
    config.prepare.max_corrupt = 0.5
    prepare.run(config, out)
    assert ids(config, out) == [i for i in GOOD if i not in (0, 2, 4, 6, 8)]


def test_latents_hold_mean_and_logvar_of_every_image(config, out):
    config.prepare.kind, sizes = "latents", set()
    prepare.run(config, out, encoder=ENCODER._replace(encode=lambda x: sizes.add(x.shape) or vae(x)))
    assert sizes == {(3, 16, 16, 3)}  # the encoder is compiled once
    c = prepared(config, out)
    assert pipeline.dataset_info(c)[:4] == (21, 2, (2, 2, 4), "latents")
    examples = records.Records(out).read(np.arange(21))
    arrays = examples.arrays
    assert arrays.keys() == {"mean", "logvar"}
    assert arrays["mean"].dtype == np.float16 and arrays["mean"].shape == (21, 2, 2, 4)
    np.testing.assert_array_equal(arrays["mean"][:, 0, 0, 0], GOOD)
    np.testing.assert_array_equal(arrays["mean"], -arrays["logvar"])
    assert examples.labels.tolist() == [i % 2 for i in GOOD]


def test_flipped_copies_follow_their_originals(config, out):
    config.prepare.kind, config.prepare.flip = "latents", True
    prepare.run(config, out, encoder=ENCODER)
    examples = records.Records(out).read(np.arange(42))
    original, flipped = examples.arrays["mean"][::2], examples.arrays["mean"][1::2]
    np.testing.assert_array_equal(flipped, original[:, :, ::-1])
    assert (original[:, :, 0, 1] < original[:, :, 1, 1]).all()
    np.testing.assert_array_equal(examples.labels[::2], examples.labels[1::2])


def test_latents_that_are_not_finite_are_an_error(config, out):
    config.prepare.kind = "latents"
    with pytest.raises(ConfigError, match=r"0006.png: its latents are not finite"):
        prepare.run(
            config,
            out,
            encoder=ENCODER._replace(encode=lambda x: (np.where(x[:, :1, :1] > 5, np.nan, 0), x[:, :1, :1])),
        )


def test_processes_share_the_shards(config, out):
    for p in (2, 0, 1):
        with pytest.raises(ConfigError, match="holds no manifest.json"):
            records.read_manifest(out)
        prepare.run(config, out, process_index=p, process_count=3)
    assert ids(config, out) == GOOD


def test_captions_are_kept(tmp_path, monkeypatch, config, out):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from tests.data.test_tars import image, write_tar

    config.data.source = "webdataset"
    config.data.path = write_tar(tmp_path / "x.tar", {"0.webp": image(1), "0.txt": b"a cat", "1.webp": image(2)})
    prepare.run(config, out)
    assert records.Records(out).read(np.arange(2)).captions == ["a cat", ""]


def test_finished_shards_are_not_made_again(config, out):
    prepare.run(config, out)
    before = {file: os.stat(os.path.join(out, file)) for file in os.listdir(out)}
    victim = next(file for file in sorted(before) if file.endswith(".arrayrecord.json"))
    os.remove(os.path.join(out, victim))
    prepare.run(config, out)
    for file, was in before.items():
        now = os.stat(os.path.join(out, file))
        again = file in (victim, victim.removesuffix(".json"), records.MANIFEST)
        assert again == ((was.st_ino, was.st_mtime_ns) != (now.st_ino, now.st_mtime_ns)), file


def test_other_settings_in_the_same_folder_are_refused(config, out, tmp_path):
    prepare.run(config, out)
    config.data.crop = False
    with pytest.raises(ConfigError, match="made in another way: image was .*'crop': True"):
        prepare.run(config, out)
    config.data.crop = True
    os.remove(tmp_path / "images" / "0" / "0006.png")
    with pytest.raises(ConfigError, match="images was 23 and is 22"):
        prepare.run(config, out)


def test_after_kills_every_good_image_is_present_once(config, out, tmp_path):
    corrupt = (3, 77, 150)
    kill_prepare.make_images(tmp_path / "many", 200, corrupt)
    config.data.path, config.prepare.shard = str(tmp_path / "many"), 4
    assert kill_prepare.run(config, out, kills=1, seed=0) == 1
    assert kill_prepare.check(out) == [i for i in range(200) if i not in corrupt]
    assert not [file for file in os.listdir(out) if file.endswith(".part")]


def test_a_full_disk_is_one_line_and_keeps_finished_files(config, out):
    config.data.image_size, config.prepare.shard = 64, 12
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # bytes; a shard takes 130 000
    try:
        with pytest.raises(ConfigError, match=f"--workdir={out} cannot be written: File too large"):
            prepare.run(config, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(out)) == ["plan.json"]
    prepare.run(config, out)
    assert len(ids(config, out)) == 21


def test_a_folder_that_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/out.* cannot be (read|written): Not a directory"):
        prepare.run(config, str(tmp_path / "file" / "out"))


def test_another_vae_is_another_preparation(config, out):
    config.prepare.kind = "latents"
    prepare.run(config, out, encoder=ENCODER)
    assert pipeline.dataset_info(prepared(config, out)).codec == "abc"
    config.codec.path = "elsewhere/the-same"
    assert prepare.run(config, out, encoder=ENCODER)["made"] == 0
    with pytest.raises(ConfigError, match="made in another way: codec was .*abc.* and is .*def"):
        prepare.run(config, out, encoder=ENCODER._replace(weights="def"))
    with pytest.raises(ConfigError, match="made in another way: codec"):
        prepare.run(config, out, encoder=SDXL)
    manifest = records.read_manifest(out)
    assert manifest["codec"].pop("scaling_factor") == 0.18215  # which follows from the weights
    assert records._fingerprint(manifest) == records.Records(out).fingerprint


def test_latents_are_scaled_by_the_factor_of_their_vae(config, out):
    """A training takes the factor of the manifest, or its config must have the same."""
    config.prepare.kind = "latents"
    prepare.run(config, out, encoder=SDXL)
    assert records.read_manifest(out)["codec"] == {
        "weights": "abc", "dtype": "float32", "scaling_factor": 0.13025, "shift_factor": 0.0, "channels": 4,
        "downsampling": 8,
    }  # fmt: skip
    c = prepared(config, out)
    codec.resolve_scale(c, pipeline.dataset_info(c).scale)
    assert (c.codec.scaling_factor, c.codec.shift_factor) == (0.13025, 0.0)
    assert pipeline.dataset_info(c).records == 21
    c.codec.scaling_factor = 0.18215
    with pytest.raises(
        ConfigError, match=r"scaling_factor=0.18215, but .* a VAE with 0.13025: set config.codec.scaling_factor=0.13025"
    ):
        pipeline.dataset_info(c)


def test_latents_of_another_shape_are_refused(config, out):
    """A VAE with 16 channels or with half the downsampling makes such latents."""
    config.prepare.kind = "latents"
    encoder = ENCODER._replace(encode=lambda images: [np.concatenate([x] * 4, -1) for x in vae(images)])
    prepare.run(config, out, encoder=encoder)
    with pytest.raises(ConfigError, match=r"latents of 2 x 2 x 16 .* the model takes 2 x 2 x 4"):
        pipeline.dataset_info(prepared(config, out))


def test_an_unusable_vae_is_refused_before_writing(config, out, tmp_path, monkeypatch):
    network = vae_weights.from_config({"block_out_channels": [4, 4, 4, 8], "norm_num_groups": 2, "latent_channels": 16})
    monkeypatch.setattr(vae_weights, "load", lambda path, dtype: (network, {}))
    config.prepare.kind = "latents"
    with pytest.raises(ConfigError, match="config.codec.latent_channels=4, but the VAE at .* has 16: set that"):
        prepare.run(config, out)
    assert not os.listdir(out)


@pytest.mark.parametrize("name", ["config.json", "checkpoints/1"])
def test_a_runs_folder_is_refused(config, out, name):
    os.makedirs(os.path.join(out, name))
    with pytest.raises(
        ConfigError, match=f"holds a run .{name.split('/')[0]}.: use a separate folder for --mode=prepare"
    ):
        prepare.run(config, out)


# ---- end to end


def test_from_a_folder_of_images_to_a_training_step_on_their_latents(tmp_path, one_device):
    """The latents of a VAE in a folder fit the training step and equal the encoder's output."""
    vae_config = {"block_out_channels": [4, 4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2}
    rng = np.random.default_rng(0)
    shapes = vae_weights.shapes(vae_weights.from_config(vae_config))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae_config))
    state_dicts.write_state_dict(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
        {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
    )
    kill_prepare.make_images(tmp_path / "images", 20, (3,))

    c = tiny.get_config("plain")
    c.codec.name, c.codec.path = "vae", str(tmp_path / "vae")
    c.data.image_size, c.data.channels, c.data.split = 64, 3, "all"
    c.data.source, c.data.path = "folder", str(tmp_path / "images")
    c.train.batch = 2
    c.prepare.kind, c.prepare.shard, c.prepare.batch = "latents", 8, 24
    figures = prepare.run(c, str(tmp_path / "latents"))
    assert (figures["made"], figures["records"], figures["skipped"]) == (3, 19, 1)
    c = prepared(c, str(tmp_path / "latents"))
    s = train_step.make_setup(c)
    mesh = partitioning.make_mesh(1, 1, 1)
    _, abstract = train_step.create_state(s.model, s.tx, c.seed, mesh)
    batch = pipeline.train_iterator(c, batch=2)
    with partitioning.scope(mesh):
        _, metrics = jax.eval_shape(train_step.make_step(s, c), abstract, next(batch), {}, np.uint32(0))
    batch.close()
    assert metrics["loss"].shape == ()

    found = records.Records(str(tmp_path / "latents"))
    source = folder.Folder(str(tmp_path / "images"))
    numbers = [i for i in range(20) if not source.name(i).endswith("0003.png")]
    images = pipeline.make_preprocessor(c).process_batch(source.read(np.array(numbers)).arrays["image"])
    weights = pipeline.dataset_info(c).codec
    assert codec.require_weights(codec.build(c), weights).load().keys() == {
        "decoder",
        "encoder",
        "post_quant_conv",
        "quant_conv",
    }
    with pytest.raises(ConfigError, match="are not those that made the latents"):
        codec.require_weights(codec.build(c), weights[::-1]).load()
    encoder = codec.encoder(c, c.prepare.batch)
    blank = np.zeros((encoder.batch - 19, 64, 64, 3), np.uint8)
    mean, logvar = (x[:19] for x in encoder.encode(np.concatenate([images, blank])))
    batch = found.read(np.arange(19))
    np.testing.assert_allclose(batch.arrays["mean"], mean, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(batch.arrays["logvar"], logvar, rtol=2e-3, atol=1e-3)
    assert batch.labels.tolist() == source.read(np.array(numbers)).labels.tolist()
