"""`train.scan`: several steps in one call give the figures and weights of single steps.

tests/training/test_lanes.py runs a real step so.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.modes import train
from madformer_jax.runtime import memory
from madformer_jax.training import scanned_steps, train_step
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device", "random_state")
SPEED = ("steps_per_second", "images_per_second", "tflops", "mfu")


def add_to_first(params, value):
    """Adds a number to the first parameter, which compiles faster than adding it to all."""
    (first, *rest), tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [first + value, *rest])


@pytest.fixture
def c():
    c = tiny.get_config("plain")
    c.model.classes = 10
    c.train.log_every, c.train.checkpoint_every, c.train.steps = 3, 4, 5
    return c


@pytest.fixture
def summing(monkeypatch):
    """Replaces the step by one that adds a function of the batch and the seed to a parameter."""

    def make_step(s, c, platform=None):
        def step(state, batch, codec_params, seed):
            image = batch["image"].astype(jnp.float32)
            ramp = jnp.arange(image[0].size, dtype=jnp.float32).reshape(image[0].shape) / image[0].size
            loss = jnp.mean(image * ramp) + jnp.mean(batch["label"] * jnp.arange(len(image))) + seed
            metrics = {"loss": loss, "grad_norm": loss + state.step, "learning_rate": loss * 0.5}
            return state._replace(step=state.step + 1, params=add_to_first(state.params, 1e-3 * loss)), metrics

        return step

    monkeypatch.setattr(train_step, "make_step", make_step)


def figures(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in SPEED} for line in lines]


def test_the_images_and_figures_are_those_of_single_steps_also_when_resumed(c, summing, tmp_path, monkeypatch):
    """A trace of a step has the call that runs it."""
    c.data.flip = True
    calls, next_selections = [], scanned_steps.next_selections
    monkeypatch.setattr(scanned_steps, "next_selections", lambda data, n: calls.append(n) or next_selections(data, n))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    single = train.run(c, str(tmp_path / "single"), grids=False)
    c.train.scan, c.profile = 5, "1:1"
    many = train.run(c, str(tmp_path / "scan"), grids=False)
    assert calls == [1, "start", 2, "stop", 1, 1]  # ends at 1 (trace), 3 (log), 4 (checkpoint) and 5
    assert figures(tmp_path / "scan") == figures(tmp_path / "single")
    assert {name: many[name] for name in many.keys() - set(SPEED)} == {
        name: single[name] for name in single.keys() - set(SPEED)
    }
    shutil.rmtree(tmp_path / "scan" / "checkpoints" / "5")
    train.run(c, str(tmp_path / "scan"), grids=False)
    assert calls[6:] == [1]
    assert figures(tmp_path / "scan") == figures(tmp_path / "single")


def test_data_that_the_memory_does_not_hold_are_refused_in_one_line(c, tmp_path, monkeypatch):
    c.train.scan = 4
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 2**20)
    with pytest.raises(
        ConfigError, match=r"train.scan=4 holds the data .* 0.00 GiB of 0.00 GiB: set config.train.scan=1"
    ):
        train.run(c, str(tmp_path), grids=False)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="of one process, and this job has 2: set config.train.scan=1"):
        scanned_steps.load_table(c, None, None, None)
