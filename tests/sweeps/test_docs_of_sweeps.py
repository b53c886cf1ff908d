"""Tests that the switch and the sweep in docs/testbed.md, and the variants of configs/sweeps, work as they are written."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from madformer_jax.config import schema
from madformer_jax.sweeps import claim_check, sweep_file

ROOT = pathlib.Path(__file__).parents[2]

CHECK = """
from types import SimpleNamespace
import jax, jax.numpy as jnp
from madformer_jax.cli import command_line
from madformer_jax.diffusion import losses
from madformer_jax.models.madformer import ModelOutputs
command_line.run(["main", "--mode=sweep", "--config=configs/sweeps/error.py", "--workdir=unused", "--dry_run"])
z = jnp.ones((2, 4, 4, 1))
outputs = ModelOutputs(image=z + 3, hidden=None, clean=None, text=None)
config = SimpleNamespace(prediction_type="x0", block_order="raster", default_order=None)
model = SimpleNamespace(config=config, apply=lambda *args, **kwargs: outputs)
for error in ("squared", "absolute"):
    weights = losses.LossWeights(hidden=0.0, error=error)
    print(error, losses.training_loss(model, {}, z, None, jax.random.key(0), weights)[0])
"""


def test_a_switch_and_its_sweep_take_less_than_thirty_lines(tmp_path):
    text = (ROOT / "docs" / "testbed.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    (sweep,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) + len(list(filter(str.strip, sweep.splitlines()))) < 30

    for folder in ("madformer_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, change in re.findall(r"--- (\S+)\n((?:[ +].*\n)+)", diff):
        lines = change.splitlines()
        before = "\n".join(line[1:] for line in lines if line.startswith(" "))
        after = "\n".join(line[1:] for line in lines)
        content = (tmp_path / name).read_text()
        assert content.count(f"\n{before}\n") == 1, f"{name} has no such line: {before}"
        (tmp_path / name).write_text(content.replace(f"\n{before}\n", f"\n{after}\n"))
    (tmp_path / "configs" / "sweeps" / "error.py").write_text(sweep)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("error=squared" in line for line in lines) == sum("error=absolute" in line for line in lines) == 3
    assert lines[-2:] == ["squared 9.0", "absolute 3.0"]


@pytest.mark.parametrize(
    "path", sorted({*ROOT.glob("configs/sweeps/*.py")} - {ROOT / "configs/sweeps/bases.py"}), ids=lambda path: path.stem
)
def test_runs_and_claims_of_every_listed_variant_are_valid(path):
    """Every file has a protocol, and a report can find the endpoint and both sides of each claim."""
    functions = runpy.run_path(str(path))
    assert functions["sweep"]().protocol
    (listed,) = re.findall(r"^Variants: (.*?)\.\s", path.read_text(), re.DOTALL | re.MULTILINE) or [""]
    variants = re.findall(r"\b(?:cpu\w*|gpu|digits|drawings|ffhq1024|imagenet256)\b", listed)
    for args in [(name,) for name in variants] or [()]:
        base, definition = functions["get_config"](*args), functions["sweep"](*args)
        for run in definition.runs:
            if run["seed"] == 0:
                schema.validate(sweep_file.apply_overrides(base, run))
        claim_check.check(definition, base)
