"""Fields that identify a run, and fields that are local to a machine."""

import json
import os
import pathlib

import pytest

from madformer_jax.cli import command_line, help
from madformer_jax.config import fields, identity, schema, table
from madformer_jax.config.table import FIELDS, Fact, Field
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, provenance, stored_config
from madformer_jax.sweeps import sweep_file

LOCAL = {  # what a stranger's config.json may name
    "codec.path": "/home/them/vae",
    "compilation_cache": "workdir",
    "convert.to_release": "/home/you/.bashrc",
    "data.path": "/home/you/pictures",
    "data.workers": 64,
    "demo.host": "0.0.0.0",
    "evaluate.grid": "steps=5;prompts=/home/you/secret.txt,a cat",
    "evaluate.images": "/home/you/pictures",
    "gallery.grid": "prompts=a cat,/home/you/secret.txt ",
    "evaluate.network_path": "/home/them/network.npz",
    "evaluate.reference": "/home/them/reference.npz",
    "evaluate.training": "gs://theirs/training.npz",
    "mesh.data": 1,
    "mesh.fsdp": 8,
    "model.attention": "cudnn",
    "model.remat": "full",
    "platform": "tpu",
    "profile": "1:2",
    "sample.image": "/home/you/picture.png",
    "sample.keep": "/home/you/mask.png",
    "sample.noise": "/home/you/noise.npy",
    "sample.prompts": "/home/you/secret.txt",
    "text.tokenizer": "/home/you/words.json",
    "train.init_from": "/home/them/run",
}


def test_one_line_adds_a_field_everywhere(monkeypatch, tmp_path):
    line = Field("down", "direction of the test", table.RESUME, choices=("down", "up"))
    path = Field("", "file of the test", table.PATH)
    for name, field in (("order", line), ("file", path)):
        monkeypatch.setitem(table.SECTIONS["loss"].fields, name, field)
        monkeypatch.setitem(FIELDS, f"loss.{name}", field)
    row = "| `loss.order` | `'down'` | direction of the test; one of `down`, `up` | resume |"
    assert row in help.reference_page() and "--config.loss.order=down" in help.page("train")
    config_file = f"--config={pathlib.Path(__file__).parents[2]}/configs/digits.py"
    c, _ = command_line.parse(
        ["main", config_file, f"--workdir={tmp_path}", "--config.loss.order=up", "--config.loss.file=~/a"]
    )
    assert (c.loss.order, c.loss.file) == ("up", os.path.expanduser("~/a"))
    before, c.loss.order = sweep_file.settings_hash(c), "down"
    assert sweep_file.settings_hash(c) != before
    assert schema.portable(c).loss.file == ""
    checkpoint.write_config(c, str(tmp_path))
    monkeypatch.setattr(checkpoint, "exists", lambda workdir: True)
    c.loss.order, c.loss.file = "up", "b"
    assert checkpoint.resume_conflicts(c, str(tmp_path)) == [
        f"config.loss.file was {os.path.expanduser('~/a')!r} and is 'b'"
    ]
    c.loss.order = "left"
    with pytest.raises(ConfigError, match="config.loss.order='left' is unknown: one of 'down', 'up'"):
        schema.validate(c)


def test_what_decides_nothing_may_change():
    assert Fact.RESUME in Fact.NEUTRAL and Fact.RESUME in Fact.MACHINE
    names = ("train.log_every", "data.workers", "data.path", "mesh.data")
    assert not any(map(identity.affects_results, names)) and all(map(identity.may_change_on_resume, names))
    assert identity.affects_results("text.tokenizer") and not identity.may_change_on_resume("text.tokenizer")
    assert identity.affects_results("train.init_from") and identity.may_change_on_resume("train.init_from")
    # A field without facts identifies a run.
    assert identity.affects_results("model.new") and not identity.may_change_on_resume("model.new")


def test_embedded_tokenizers_are_known_by_name():
    assert set(table.EMBEDDED_TOKENIZERS) == text._EMBEDDED_FILES.keys()


@pytest.fixture
def content():
    """The config.json of somebody else."""
    c = schema.base()
    c.text.vocabulary, c.text.length = 300, 8
    c.update_from_flattened_dict(LOCAL)
    c.model.width = 64
    return json.loads(c.to_json())


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_stranger_s_file_chooses_no_path_and_no_mesh(content, caplog):
    c = stored_config.config_from_saved(content, "theirs/config.json")
    assert (
        len(caplog.messages) == 1 and "data.path='/home/you/pictures'" in caplog.text and "\n" not in caplog.messages[0]
    )
    found, defaults = fields.flat(c), fields.flat(schema.base())
    assert found["text.tokenizer"] == "theirs/tokenizer.json"
    assert {name: found[name] for name in LOCAL if name != "text.tokenizer"} == {
        name: defaults[name] for name in LOCAL if name != "text.tokenizer"
    }
    assert c.model.width == 64 and c.text.length == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codec.path", "stabilityai/sd-vae-ft-mse"),
        ("codec.path", "stabilityai/sd-vae-ft-mse@main"),
        ("sample.prompts", "a cat; a dog"),
        ("sample.prompts", "data:test"),
        ("sample.keep", "0, 1,5"),
        ("evaluate.grid", "steps=5,20;prompts=a cat,data:test"),
        ("text.tokenizer", "drawings"),
        ("evaluate.images", "data:train"),
    ],
)
def test_what_is_no_path_stays(content, name, value):
    section, _, field = name.partition(".")
    content[section][field] = value
    assert fields.flat(stored_config.config_from_saved(content, "theirs/config.json"))[name] == value


@pytest.mark.parametrize("path", ["weights/vae", "../vae", "./vae", "~/vae", "gs://theirs/vae", "file:///vae", "vae"])
def test_only_the_id_of_a_hub_is_no_path(content, path, tmp_path, monkeypatch):
    """A folder of that name in the current folder is not opened either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "vae").mkdir(parents=True)
    content["codec"]["path"] = path
    assert stored_config.config_from_saved(content, "theirs/config.json").codec.path == ""


def test_the_tokenizer_in_the_current_folder_is_not_that_of_a_stranger(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    content["text"]["tokenizer"] = "tokenizer.json"
    assert stored_config.config_from_saved(content, "theirs/config.json").text.tokenizer == "theirs/tokenizer.json"


def test_the_config_of_a_run_of_ours_keeps_its_paths_but_for_the_compilation_cache(content):
    provenance.record(content)
    found = fields.flat(stored_config.config_from_saved(content, "ours/config.json"))
    assert {name: found[name] for name in LOCAL} == LOCAL | {"compilation_cache": "auto"}
    content["data"]["path"] = "/etc"  # changed by somebody else
    assert stored_config.config_from_saved(content, "ours/config.json").data.path == ""


def test_several_processes_read_the_same_config_whatever_each_has_recorded(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    provenance.record(content)
    args = ["main", "--mode=reference", f"--workdir={tmp_path}"]
    assert command_line.parse(args)[0].data.path == LOCAL["data.path"]
    assert command_line.parse([*args, "--coordinator=host:1"])[0].data.path == ""
    assert command_line.parse([*args, "--distributed"])[0].data.path == ""


def test_a_cache_that_cannot_be_written_records_nothing(content, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    provenance.record(content)
    assert not provenance.is_recorded(content)
