"""Training and sampling under settings of JAX that a user, or a program that imports the package, may have on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import madformer_jax
from madformer_jax.cli import command_line

SETTINGS: dict[str, Any] = {
    "jax_enable_x64": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
}


def apply(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)


@pytest.fixture
def restored() -> Iterator[None]:
    """Restores the settings after the test."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    apply(before)


def run(workdir: Path, settings: dict[str, Any]) -> tuple[list[Any], list[np.ndarray]]:
    """The metrics of a training of two steps, and images that its model draws at once and in a stream."""
    values = {"model.classes": 10, "train.steps": 2, "train.log_every": 1, "sample.n": 1, "sample.steps": 1}
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    apply(settings)
    assert command_line.main(["main", "--config=tests/tiny.py:plain", f"--workdir={workdir}", *arguments]) == 0
    apply(settings)  # the command line has reset them
    model = madformer_jax.load(str(workdir))
    images = [model.sample(labels=[3, 1]), *(frame.images for frame in model.stream(labels=[3, 1], guidance=1.5))]
    assert {name: getattr(jax.config, name) for name in settings} == settings
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "loss" in k or "grad" in k} for line in lines], images


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "restored")
def test_settings_of_jax_change_no_number(tmp_path, capsys):
    """All settings are on at once: each makes JAX stricter or more precise in its own way."""
    usual = run(tmp_path / "usual", {})
    metrics, images = run(tmp_path / "changed", SETTINGS)
    warnings = capsys.readouterr().err
    for name, value in SETTINGS.items():
        assert f"{name.upper()}={value} is not supported" in warnings
    np.testing.assert_equal(metrics, usual[0])
    np.testing.assert_equal(images, usual[1])
