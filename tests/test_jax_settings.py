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


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Restores a setting after the test."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield request.param, SETTINGS[request.param]
    for name, value in before.items():
        jax.config.update(name, value)


def run(workdir: Path, setting: tuple[str, Any] | None = None) -> tuple[list[Any], list[np.ndarray]]:
    """The metrics of a training of two steps, and images that its model draws at once and in a stream."""
    values = {"model.classes": 10, "train.steps": 2, "train.log_every": 1, "sample.n": 1, "sample.steps": 1}
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    if setting:
        jax.config.update(*setting)
    assert command_line.main(["main", "--config=tests/tiny.py:plain", f"--workdir={workdir}", *arguments]) == 0
    if setting:  # the command line has reset it
        jax.config.update(*setting)
    model = madformer_jax.load(str(workdir))
    images = [model.sample(labels=[3, 1]), *(frame.images for frame in model.stream(labels=[3, 1], guidance=1.5))]
    if setting:
        assert getattr(jax.config, setting[0]) == setting[1]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "loss" in k or "grad" in k} for line in lines], images


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """A mesh of the first device only, as on a plain CPU."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[np.ndarray]]:
    return run(tmp_path_factory.mktemp("usual"))


def test_a_setting_of_jax_changes_no_number(tmp_path, usual, setting, capsys):
    metrics, images = run(tmp_path, setting)
    name, value = setting
    assert f"{name.upper()}={value} is not supported" in capsys.readouterr().err
    np.testing.assert_equal(metrics, usual[0])
    np.testing.assert_equal(images, usual[1])
