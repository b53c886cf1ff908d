"""Paths on the command line: names of all kinds, `~`, and folders that cannot hold checkpoints."""

import pytest

from madformer_jax.cli import command_line
from madformer_jax.config import fields, schema
from madformer_jax.config.table import FIELDS, PATH
from tests import paths
from tests.cli.test_command_line import DIGITS, error_of


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("name", paths.NAMES)
def test_any_name_is_a_path(name):
    c, values = command_line.parse(["main", DIGITS, f"--workdir=./{name}/x", f"--config.data.path=./{name}"])
    schema.validate(c)
    assert (values.workdir, c.data.path) == (f"./{name}/x", f"./{name}")


def test_a_leading_tilde_is_expanded_wherever_a_path_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:b.py").write_text(
        "from madformer_jax import config\n"
        "def get_config(text=''):\n c = config.base()\n c.data.path, c.data.source = '~/data', text\n return c\n"
    )
    given = {name: f"~/{name}" for name, field in FIELDS.items() if PATH in field.facts}
    given |= {"data.path": "", "sample.prompts": "~/prompts.txt"}
    args = [f"--config.{name}={path}" for name, path in given.items() if path]
    c, values = command_line.parse(["main", "--config=~/a:b.py:folder", "--workdir=~/run", *args])
    found = fields.flat(c)
    assert values.workdir == f"{tmp_path}/run" and c.data.source == "folder"
    assert {name: found[name] for name in given if name != "data.path"} == {
        name: path.replace("~", str(tmp_path)) for name, path in given.items() if path
    }
    assert c.data.path == f"{tmp_path}/data"  # as a config file has it


@pytest.mark.parametrize("mode", ["train", "export", "convert", "sweep"])
@pytest.mark.parametrize("name", ["a[1]", "a#b/run", "a%41b"])
def test_a_workdir_that_holds_no_checkpoint_is_refused_first(capsys, tmp_path, mode, name):
    file = "--config=configs/sweeps/depth.py:digits" if mode == "sweep" else DIGITS
    convert = ["--config.convert.vae=none.safetensors"] if mode == "convert" else []
    status, line = error_of(capsys, file, f"--mode={mode}", f"--workdir={tmp_path}/{name}", *convert)
    assert status == 2
    assert f"{tmp_path}/{name}: checkpoints cannot be written here" in line
    assert not list(tmp_path.iterdir())
