"""Folder of compiled programs: the user chooses it, a loaded workdir must not, because they are executed."""

import os

import jax
import pytest

from madformer_jax.cli import command_line
from madformer_jax.runtime import checkpoint
from tests import tiny


@pytest.mark.parametrize("cache", ["workdir", "/theirs/xla"])
def test_a_workdir_does_not_choose_the_place_of_compiled_programs(tmp_path, cache):
    """They are executed. Not even if a run of ours has written its config."""
    c = tiny.get_config()
    c.compilation_cache = cache
    checkpoint.write_config(c, str(tmp_path))
    args = ["main", "--mode=sample", f"--workdir={tmp_path}"]
    assert command_line.parse(args)[0].compilation_cache == "auto"
    assert command_line.parse([*args, f"--config.compilation_cache={cache}"])[0].compilation_cache == cache


@pytest.mark.parametrize(
    ("setting", "variable", "changes"),
    [
        ("auto", "/mine", {"jax_compilation_cache_dir": "/mine"}),
        ("auto", "", {"jax_compilation_cache_dir": "/home/xla"}),
        ("/asked", "/mine", {"jax_compilation_cache_dir": "/asked"}),
        ("workdir", "/mine", {"jax_compilation_cache_dir": os.path.abspath("run/xla")}),
        ("off", "/mine", {"jax_enable_compilation_cache": False}),
    ],
)
def test_the_environment_names_the_cache_unless_the_user_asks_for_another(monkeypatch, setting, variable, changes):
    seen = {}
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    monkeypatch.setattr(command_line.storage, "user_cache", lambda kind: f"/home/{kind}")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    command_line._set_compilation_cache(setting, "run")
    assert seen == changes
