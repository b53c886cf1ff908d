"""--mode=prepare and source arrayrecord: every good image once, whatever is killed, and nothing trains on less."""

import json
import os
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from madformer_jax import config as config_lib
from madformer_jax.data import pipeline, preprocess, records
from madformer_jax.errors import ConfigError
from madformer_jax.modes import prepare
from madformer_jax.weights import files
from madformer_jax.weights import vae as vae_weights
from tests import QUICK
from tests.data import kill_prepare


@pytest.fixture
def config(tmp_path):
    kill_prepare.make_images(tmp_path / "images", 23, corrupt=(4, 9))
    c = config_lib.base()
    c.data.source, c.data.path, c.data.image_size = "folder", str(tmp_path / "images"), 8
    c.data.split = "all"
    c.model.blocks = c.model.unet_stride = 1
    c.prepare.shard, c.prepare.batch, c.prepare.max_corrupt = 5, 3, 0.1
    return c


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def encode(images):
    """A stand-in for the VAE: 8 x 8 pixels become 2 x 2 positions, each (red mean, 1, 2, 3)."""
    mean = np.ones((len(images), 2, 2, 4), np.float32) * [0, 1, 2, 3]
    mean[..., 0] = images[..., 0].reshape(-1, 2, 4, 2, 4).mean((2, 4))
    mean[..., 1] = images[..., 2].reshape(-1, 2, 4, 2, 4).mean((2, 4))
    return mean, -mean


def prepared(config, out):
    c = ml_collections.ConfigDict(config.to_dict())
    c.data.source, c.data.path = "arrayrecord", out
    return c


def ids(config, out) -> list[int]:
    """Numbers of the images that a prepared folder holds, in order."""
    found = []
    for batch in pipeline.ordered_batches(prepared(config, out), batch=7):
        pixels = np.rint((batch["image"] + 1) * 127.5).astype(int)
        numbers = pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 0, 1]
        assert (batch["label"] == numbers % 2).all()
        found += numbers.tolist()
    return found


GOOD = [i for i in [*range(0, 23, 2), *range(1, 23, 2)] if i not in (4, 9)]  # the folder's order


def test_images_come_back_as_they_were_read(config, out):
    prepare.run(config, out)
    assert ids(config, out) == GOOD
    read = [pixels for i in range(23) if (pixels := _read(config, i)) is not None]
    np.testing.assert_array_equal(records.Records(out).read(np.arange(21)).arrays["image"], read)


def _read(config, index):
    source = pipeline.sources.open_source(config)
    try:
        return pipeline.table(config).batch(source.read(np.array([index])).arrays["image"])[0]
    except ValueError:
        return None


def test_corrupt_images_are_skipped_counted_and_listed(config, out):
    prepare.run(config, out)
    manifest = records.manifest(out)
    assert [os.path.basename(name) for name, _ in manifest["skipped"]] == ["0004.png", "0009.png"]
    assert all(reason for _, reason in manifest["skipped"])
    assert manifest["records"] == 21 and sum(shard["skipped"] for shard in manifest["shards"]) == 2


def test_more_corrupt_images_than_allowed_is_an_error(config, out):
    config.prepare.max_corrupt = 0.05
    with pytest.raises(ConfigError, match=r"2 of 23 images are corrupt.*max_corrupt=0.05.*0009.png"):
        prepare.run(config, out)
    with pytest.raises(ConfigError, match="holds no manifest.json"):
        pipeline.describe(prepared(config, out))
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
    config.prepare.kind = "latents"
    prepare.run(config, out, encode=encode)
    c = prepared(config, out)
    assert pipeline.describe(c)[:4] == (21, 2, (2, 2, 4), "latents")
    batches = list(pipeline.ordered_batches(c, batch=4))
    assert batches[0].keys() == {"mean", "logvar", "label"}
    mean = np.concatenate([batch["mean"] for batch in batches])
    assert mean.dtype == np.float16 and mean.shape == (21, 2, 2, 4)
    np.testing.assert_array_equal(np.rint((mean[:, 0, 0, 0] + 1) * 127.5), GOOD)
    np.testing.assert_array_equal(mean, -np.concatenate([batch["logvar"] for batch in batches]))
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == [i % 2 for i in GOOD]


def test_every_batch_to_the_encoder_has_one_size(config, out):
    sizes = set()

    def counting(images):
        sizes.add(images.shape)
        return encode(images)

    config.prepare.kind = "latents"
    prepare.run(config, out, encode=counting)
    assert sizes == {(3, 8, 8, 3)}


def test_flipped_copies_stand_beside_their_originals(config, out):
    config.prepare.kind, config.prepare.flip = "latents", True
    prepare.run(config, out, encode=encode)
    (batch,) = pipeline.ordered_batches(prepared(config, out), batch=42)
    original, flipped = batch["mean"][::2], batch["mean"][1::2]
    np.testing.assert_array_equal(flipped, original[:, :, ::-1])
    assert (original[:, :, 0, 1] < original[:, :, 1, 1]).all()
    np.testing.assert_array_equal(batch["label"][::2], batch["label"][1::2])


def test_latents_that_are_not_finite_stop_it(config, out):
    config.prepare.kind = "latents"
    with pytest.raises(ConfigError, match=r"0006.png: its latents are not finite"):
        prepare.run(
            config, out, encode=lambda images: (np.where(images[:, :1, :1] > -0.96, np.nan, 0), images[:, :1, :1])
        )


def test_processes_share_the_shards(config, out):
    for p in (2, 0, 1):
        with pytest.raises(ConfigError, match="holds no manifest.json"):
            records.manifest(out)
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


def test_another_preparation_into_the_same_folder_is_refused(config, out, tmp_path):
    prepare.run(config, out)
    config.data.crop = False
    with pytest.raises(ConfigError, match="made in another way: image was .*'crop': True"):
        prepare.run(config, out)
    config.data.crop = True
    os.remove(tmp_path / "images" / "0" / "0006.png")
    with pytest.raises(ConfigError, match="images was 23 and is 22"):
        prepare.run(config, out)


def test_killed_at_random_it_still_ends_with_every_good_image_once(config, out, tmp_path):
    corrupt = (3, 77, 150)
    kill_prepare.make_images(tmp_path / "many", 200, corrupt)
    config.data.path, config.prepare.shard = str(tmp_path / "many"), 10
    assert kill_prepare.run(config, out, kills=2, seed=0) == 2
    assert kill_prepare.check(out) == [i for i in range(200) if i not in corrupt]
    assert not [file for file in os.listdir(out) if file.endswith(".part")]


# ---- source arrayrecord


def test_records_are_shuffled_flipped_and_resumed_like_any_source(config, out):
    prepare.run(config, out)
    c = prepared(config, out)
    c.data.flip = True
    iterator = pipeline.train_iterator(c, batch=7)
    first = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    wanted = next(iterator)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["image"], wanted["image"])
    iterator.close()
    images = np.concatenate([batch["image"] for batch in first])
    assert sorted(np.rint((images[:, 0, 0, 0] + 1) * 127.5).astype(int)) == sorted(GOOD)
    flipped = images[:, 0, 0, 2] > images[:, 0, -1, 2]
    assert 3 < flipped.sum() < 18


def test_records_keep_their_split(config, out):
    config.data.split, config.data.test_share = "train", 0.3
    prepare.run(config, out)
    kept = set(ids(config, out))
    assert 5 < len(kept) < 21
    c = prepared(config, out)
    c.data.split = "test"
    with pytest.raises(ConfigError, match="split='test', but .* was prepared from split 'train'"):
        pipeline.describe(c)


def test_training_refuses_records_that_do_not_fit_its_config(config, out, tmp_path):
    prepare.run(config, out)
    c = prepared(config, out)
    c.data.image_size = 16
    with pytest.raises(ConfigError, match="data.image_size=16, but .* were prepared with 8"):
        pipeline.describe(c)
    config.prepare.kind, out = "latents", str(tmp_path / "latents")
    prepare.run(config, out, encode=encode)
    c = prepared(config, out)
    c.data.flip = True
    with pytest.raises(ConfigError, match="latents cannot be flipped"):
        pipeline.describe(c)
    c.data.flip, c.codec.name = False, "pixel"
    with pytest.raises(ConfigError, match="codec.name='pixel'.* are VAE latents"):
        pipeline.describe(c)


def test_damaged_shards_are_found_and_made_again(config, out):
    prepare.run(config, out)
    shard = os.path.join(out, "shard-00001-of-00005.arrayrecord")
    flip_a_bit(shard)
    with pytest.raises(ConfigError, match="00001-of-00005.arrayrecord is damaged at record"):
        ids(config, out)
    os.truncate(os.path.join(out, "shard-00003-of-00005.arrayrecord"), 100)
    with pytest.raises(ConfigError, match="00003-of-00005.arrayrecord is missing or not .* bytes long"):
        pipeline.describe(prepared(config, out))
    before = {file: os.stat(os.path.join(out, file)).st_ino for file in os.listdir(out)}
    prepare.run(config, out)
    assert ids(config, out) == GOOD
    made = [file for file, inode in before.items() if os.stat(os.path.join(out, file)).st_ino != inode]
    assert sorted(file for file in made if file.endswith("record")) == [
        f"shard-0000{k}-of-00005.arrayrecord" for k in (1, 3)
    ]


def flip_a_bit(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_more_shards_than_may_be_open_are_read(config, out, monkeypatch):
    prepare.run(config, out)
    monkeypatch.setattr(records, "MAX_OPEN", 2)
    order = np.random.default_rng(0).permutation(21)
    batch = records.Records(out).read(order)
    assert (batch.arrays["image"][:, 0, 0, 0] == np.array(GOOD)[order]).all()
    assert (batch.labels == np.array(GOOD)[order] % 2).all()


def test_a_full_disk_is_one_line_and_leaves_what_was_finished(config, out):
    """In a process of its own, whose files may not grow beyond the first shards' size."""
    config.data.image_size, config.prepare.shard = 64, 10
    limit = 100_000  # bytes; a shard takes 130 000
    script = (
        "import json, resource, signal, sys\n"
        "from ml_collections import ConfigDict\n"
        "from madformer_jax.errors import ConfigError\n"
        "from madformer_jax.modes import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    prepare.run(ConfigDict(json.loads(sys.argv[1])), sys.argv[2], process_index=0, process_count=1)\n"
        "except ConfigError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, config.to_json(), out], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"--workdir={out} cannot be written: write() failed: File too large" in done.stderr.splitlines()[-1]
    prepare.run(config, out)
    assert len(ids(config, out)) == 21


def test_a_folder_that_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--workdir=.*/file/out cannot be written: Not a directory"):
        prepare.run(config, str(tmp_path / "file" / "out"))


def test_an_unfinished_or_foreign_folder_is_refused(config, out, tmp_path):
    c = prepared(config, out)
    c.data.path = str(tmp_path)
    with pytest.raises(ConfigError, match="holds no manifest.json: make the records with --mode=prepare"):
        pipeline.describe(c)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="is of format 99, not 1"):
        pipeline.describe(c)
    (tmp_path / "manifest.json").write_text('{"format"')
    with pytest.raises(ConfigError, match="manifest.json cannot be read"):
        pipeline.describe(c)


# ---- the whole way


def test_from_a_folder_of_images_to_a_model_trained_on_their_latents(tiny_config, tmp_path):
    """As a user runs it: --mode=prepare, then --mode=train on what it wrote, with the VAE's files in a folder."""
    vae_config = {"block_out_channels": [4, 4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2}
    rng = np.random.default_rng(0)
    shapes = vae_weights.shapes(vae_weights.from_config(vae_config))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae_config))
    files.write_state_dict(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
        {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
    )
    kill_prepare.make_images(tmp_path / "images", 20, (3,))

    c = tiny_config
    c.codec.name, c.codec.path = "vae", str(tmp_path / "vae")
    c.data.image_size, c.data.channels, c.data.split = 64, 3, "all"
    c.model.blocks, c.model.classes, c.model.depth, c.mesh.data = 1, 2, 2, -1
    c.train.steps, c.train.checkpoint_every = 2, 2
    c.sample.steps, c.sample.guidance = 1, 1.0
    c.prepare.kind, c.prepare.shard, c.prepare.batch = "latents", 8, 4
    (tmp_path / "config.py").write_text(kill_prepare.CONFIG.format(json=c.to_json()))

    def run(mode, workdir, source, path):
        """In a process of its own, with one device: the step compiles in a fraction of the time that it takes for eight."""
        data = f"--config.data.source={source}", f"--config.data.path={tmp_path / path}"
        command = f"--config={tmp_path / 'config.py'}", f"--mode={mode}", f"--workdir={tmp_path / workdir}", *data
        env = os.environ | {"XLA_FLAGS": QUICK}
        return subprocess.run([sys.executable, "-m", "madformer_jax.main", *command], env=env).returncode

    assert run("prepare", "latents", "folder", "images") == 0
    assert run("train", "run", "arrayrecord", "latents") == 0
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert (tmp_path / "run" / "samples" / "step_000002_ema.png").exists()

    # what training read is what the VAE says of the images
    found = records.Records(str(tmp_path / "latents"))
    source = pipeline.sources.Folder(str(tmp_path / "images"))
    numbers = [i for i in range(20) if not source.name(i).endswith("0003.png")]
    images = pipeline.table(c).batch(source.read(np.array(numbers)).arrays["image"])
    model, params = vae_weights.load(c.codec.path)
    mean, logvar = model.apply({"params": params}, preprocess.to_float(images), method="encode")
    batch = found.read(np.arange(19))
    np.testing.assert_allclose(batch.arrays["mean"], mean, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(batch.arrays["logvar"], logvar, rtol=2e-3, atol=1e-3)
    assert batch.labels.tolist() == source.read(np.array(numbers)).labels.tolist()
