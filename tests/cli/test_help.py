"""Pages of --help, and the commands that a finished training suggests."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from madformer_jax.cli import command_line, help
from madformer_jax.config import schema, table
from madformer_jax.runtime import storage
from tests.cli.test_command_line import DIGITS, as_in_a_process_of_its_own, error_of  # noqa: F401


def test_help_names_every_mode_and_the_fields_of_one(capsys):
    for flag in ("--help", "-h"):
        assert command_line.main(["main", flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        summaries = {line.split()[0]: line for line in lines if line.startswith("  ")}
        assert summaries.keys() >= {"train", "sample", "evaluate", "prepare"}
        assert summaries["export"].endswith(
            "the averaged weights as a workdir of their own, to sample from and to publish"
        )
    assert command_line.main(["main", "--mode=sample", "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"--config.sample.steps=50 +solver steps of a block, .*; from 1 to 10000\n", text)
    assert "--config.optimizer" not in text
    assert re.search(r"--config.sample.grid=64 +the first images, shown in the PNG", text)
    assert "--mode=trian" in error_of(capsys, "--mode=trian", "--help")[1]


def test_help_ends_quietly_if_nobody_reads_it_to_its_end():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "madformer_jax", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_where_the_configs_are_is_said(monkeypatch, capsys, tmp_path):
    checkout = os.getcwd()
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, DIGITS, "--workdir=run")[1]
    assert f"'configs/digits.py' does not exist in {tmp_path}. Use --config={checkout}/configs/digits.py." in line
    monkeypatch.setattr(help, "__file__", f"{tmp_path}/site-packages/madformer_jax/cli/help.py")
    line = error_of(capsys, DIGITS, "--workdir=run")[1]
    assert "The project's configs are not part of an installed package: run the command in a checkout" in line


def test_help_leaves_out_no_mode_and_no_field():
    for mode, what in help.mode_summaries().items():
        assert what and not what.startswith("--mode"), (
            f"the first line of modes/{mode}.py must be --mode={mode}: what it does."
        )
        assert f"--mode={mode}: " in help.page(mode)
    assert {section for named in help._SECTIONS.values() for section in named} <= table.SECTIONS.keys()
    assert all(field.doc for field in table.FIELDS.values())


@pytest.mark.parametrize("workdir", ["runs/x", "a run/$HOME's #1"])
@pytest.mark.parametrize("scores", ["", "FD-classifier of 9 samples: 1"])
@pytest.mark.parametrize("classes", [0, 10])
def test_what_a_training_says_to_try_next_can_be_tried(monkeypatch, classes, scores, workdir):
    c = schema.base()
    c.model.classes = classes
    monkeypatch.setattr(storage, "read_json", {f"{workdir}/config.json": json.loads(c.to_json())}.get)
    commands = [
        shlex.split(line)[3:]
        for line in help.after_training(c, workdir, scores).splitlines()
        if line.startswith("  python")
    ]
    assert len(commands) == (3 if scores else 4) and "--mode=demo" in commands[-1]
    for command in commands:
        given, values = command_line.parse(["main", *command])
        assert values.workdir == workdir
        schema.validate(given)
