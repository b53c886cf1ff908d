import base64
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import madformer_jax
from madformer_jax.cli import command_line
from madformer_jax.config import fields, schema
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import export, train
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import generation
from madformer_jax.training import train_step
from madformer_jax.weights import state_dicts
from tests import small, tiny


@pytest.fixture
def plain():
    c = tiny.get_config("plain")
    c.mesh.data = 8
    return c


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A workdir with a checkpoint of step 3, and its averages, which differ from the parameters."""
    c, workdir = tiny.get_config("plain"), str(tmp_path_factory.mktemp("untrained"))
    c.mesh.fsdp, c.mesh.tensor = 4, 2
    mesh = partitioning.make_mesh(1, 4, 2)
    s = train_step.make_setup(c)
    _, abstract = train_step.create_state(s.model, s.tx, c.seed, mesh)
    params, opt = small.random_params(s.model), jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.opt)
    arrays = {"params": params, "ema": jax.tree.map(lambda x: np.float32(1.5) * x, params), "opt": opt}
    arrays = {
        name: jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, getattr(abstract, name))
        for name, tree in arrays.items()
    }
    checkpoint.write_config(c, workdir)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, arrays, {"next_batch": 3}, {"step": 3, "data": {"names": ["cat"]}})
    return workdir, jax.device_get(arrays["ema"])


@pytest.fixture
def run(untrained, tmp_path):
    """A copy of the untrained workdir, and its averages."""
    return shutil.copytree(untrained[0], tmp_path / "run"), untrained[1]


def test_an_export_holds_only_the_averages_and_can_be_sampled(plain, run):
    (workdir, ema), exported = run, str(run[0] / "export")
    plain.sample.weights = "raw"
    plain.mesh.data, plain.mesh.fsdp = 2, 4  # not the mesh of the save
    export.run(plain, str(workdir))
    assert {p.name for p in (checkpoint.folder(exported) / "3").iterdir()} >= {"ema", "meta"}
    assert not {p.name for p in (checkpoint.folder(exported) / "3").iterdir()} & {"params", "opt", "data"}
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    target = generation.abstract_params(train_step.make_setup(plain).model, mesh)
    with checkpoint.Checkpoints(exported, read_only=True) as checkpoints:
        step, trees, _ = checkpoints.restore({"ema": target})
        assert checkpoints.meta(step) == {"step": 3, "data": {"names": ["cat"]}}
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, trees["ema"], ema)

    tensors, metadata, _ = state_dicts.read_state_dict(f"{exported}/model.safetensors")
    assert metadata == {"step": 3, "names": ["cat"]}
    assert {name: x.tolist() for name, x in tensors.items()} == {
        ".".join(name): x.tolist() for name, x in flatten_dict(ema).items()
    }

    args = ["main", "--mode=sample", f"--workdir={exported}", "--config.sample.n=3"]  # uses the export's config.json
    assert command_line.main(args) == 0
    (folder,) = (workdir / "export" / "samples").glob("step_000003_ema_*_n3_*")
    images = next(generation.read_shards(folder)).images
    assert len(images) == 3
    shutil.rmtree(run[0] / "export" / "checkpoints")  # as on a hub without checkpoints
    model = madformer_jax.load(exported)
    assert model.labels == ("cat",)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), ema)


def test_an_export_names_no_path_or_setting_of_the_machine(plain, run, tmp_path):
    """No file names a folder of the user. The mesh, the cache and the step have their defaults."""
    secret = tmp_path / "users" / "jane" / "secret"
    local = {
        "codec.path": f"{secret}/vae",
        "compilation_cache": f"{secret}/cache",
        "data.path": f"{secret}/pictures",
        "demo.other": f"{secret}/other",
        "evaluate.network_path": f"{secret}/network.npz",
        "evaluate.reference": f"{secret}/reference.npz",
        "sample.noise": f"{secret}/noise.npy",
        "train.init_from": f"{secret}/run",
        "data.workers": 3,
        "mesh.fsdp": 8,
        "mesh.data": 1,
        "model.remat": "full",
        "sample.step": 3,
    }
    plain.update_from_flattened_dict(local)
    exported = export.run(plain, str(run[0]))["export"]
    for path in pathlib.Path(exported).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"jane" not in content and str(tmp_path).encode() not in content, path
    published = fields.flat(json.loads((run[0] / "export" / "config.json").read_text()))
    defaults = fields.flat(schema.base())
    assert {name: published[name] for name in local} == {name: defaults[name] for name in local}
    assert published["model.width"] == plain.model.width


def test_an_export_keeps_the_hub_id_of_its_vae():
    c = schema.base()
    c.codec.path = "stabilityai/sd-vae-ft-mse@main"
    assert schema.portable(c).codec.path == c.codec.path


def test_an_export_from_eight_devices_loads_on_one(plain, run, monkeypatch):
    """Its config.json names no mesh. Those of earlier versions do, and load as well."""
    exported = run[0] / "export"
    export.run(plain, str(run[0]))
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    stored = json.loads((exported / "config.json").read_text())
    assert madformer_jax.load(str(exported)).config.mesh.data == -1
    stored["mesh"] |= {"data": 1, "fsdp": 8}
    stored |= {"compilation_cache": "workdir", "platform": "tpu"}
    (exported / "config.json").write_text(json.dumps(stored))
    assert madformer_jax.load(str(exported)).config.mesh.fsdp == 1


def test_training_cannot_resume_from_an_export(plain, run):
    export.run(plain, str(run[0]))
    with pytest.raises(ConfigError, match="step 3 holds no params, opt, data, only ema"):
        train.run(plain, str(run[0] / "export"))


def test_a_second_export_replaces_the_first(plain, run):
    export.run(plain, str(run[0]))
    assert "## Scores" not in (run[0] / "export" / "README.md").read_text()
    (run[0] / "samples").mkdir()
    (run[0] / "samples" / "step_000003_ema.png").write_bytes(b"picture")
    (run[0] / "evaluations").mkdir()
    (run[0] / "evaluations" / "raw.json").write_text(
        json.dumps({"protocol": {"images": {"step": 3, "weights": "raw"}}, "scores": {}})
    )
    for step in (2, 3):
        images = {"step": step, "weights": "ema", "solver": "ddim", "spacing": "leading", "steps": 4, "guidance": 1.0}
        result = {
            "protocol": {"n": 50, "reference": "abc", "images": images},
            "scores": {"FD-classifier": {"value": step / 2, "low": 1, "high": 2}},
        }
        (run[0] / "evaluations" / f"{step}.json").write_text(json.dumps(result))
    export.run(plain, str(run[0]))
    card = (run[0] / "export" / "README.md").read_text()
    assert "| ddim | leading | 4 | 1.0 | 50 | 1.5 [1, 2] | abc |" in card and card.count("| ddim |") == 1
    assert "![samples](grid.png)" in card and (run[0] / "export" / "grid.png").read_bytes() == b"picture"
    newer, older = checkpoint.folder(str(run[0])), checkpoint.folder(str(run[0] / "export"))
    (newer / "3").rename(newer / "4")
    export.run(plain, str(run[0]))
    assert [p.name for p in older.iterdir() if p.name.isdigit()] == ["4"]
    assert json.loads((run[0] / "export" / "config.json").read_text())["sample"]["weights"] == "ema"


def test_an_export_of_another_training_replaces_equal_and_later_steps(plain, run):
    workdir, ema = run
    exported = str(workdir / "export")
    export.run(plain, str(workdir))
    shutil.copytree(checkpoint.folder(exported) / "3", checkpoint.folder(exported) / "4")
    shutil.rmtree(checkpoint.folder(str(workdir)))
    other = jax.tree.map(lambda x: x + 1, ema)
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(3, {"ema": other}, None, {"step": 3})
    export.run(plain, str(workdir))
    assert [p.name for p in checkpoint.folder(exported).iterdir()] == ["3"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(madformer_jax.load(exported).params), other)


def test_an_export_includes_the_tokenizer(tmp_path, one_device, monkeypatch):
    """The moved export samples equal images without the workdir and the original tokenizer.

    A different tokenizer in the working directory does not matter.
    """
    c = tiny.get_config("plain")
    words = tmp_path / "words.json"
    words.write_text(text.train_bpe(["a cat", "a dog"] * 9, 300))
    c.text.tokenizer, c.text.length = str(words), 6
    c.text.vocabulary = text.open_tokenizer(str(words)).vocabulary
    c.sample.prompts = "a cat; a dog"
    with checkpoint.Checkpoints(str(tmp_path / "run")) as checkpoints:
        meta = {"step": 3, **text.tokenizer_identity(c)}
        checkpoints.save(3, {"ema": small.random_params(madformer.build(c))}, None, meta)
    checkpoint.write_config(c, str(tmp_path / "run"))
    images = madformer_jax.load(str(tmp_path / "run")).sample(2)
    export.run(c, str(tmp_path / "run"))
    moved = (tmp_path / "run" / "export").rename(tmp_path / "moved")
    words.unlink()
    text.open_tokenizer.cache_clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.train_bpe(["another"], 290))
    model = madformer_jax.load(str(moved))
    assert model.config.text.tokenizer == str(moved / "tokenizer.json")
    np.testing.assert_array_equal(model.sample(2), images)
    assert (images[0] != images[1]).any()
    (moved / "tokenizer.json").write_text(text.train_bpe(["a bat", "a fog"] * 9, 300))
    text.open_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match="has changed since step 3 of .*moved"):
        madformer_jax.load(str(moved))


def test_other_tokenizers_are_not_exported(tmp_path):
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)))
    assert (
        text.exportable_content(str(ranks)) is None
        and text.exportable_content("drawings") is None
        and text.exportable_content("") is None
    )
