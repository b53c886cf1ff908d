"""Lanes: runs that train in one program equal runs of their own, and each has its own files."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.modes import train
from madformer_jax.runtime import partitioning
from madformer_jax.training import lanes, train_step
from tests import tiny
from tests.kill import final
from tests.training.test_scanned_steps import add_to_first, figures

pytestmark = pytest.mark.usefixtures("one_device", "random_state")


@pytest.fixture
def two():
    """Two configs that differ in seeds and numbers only."""
    c = tiny.get_config("plain")
    c.model.classes = 10
    c.train.log_every, c.train.checkpoint_every, c.train.steps = 3, 4, 5
    other = c.copy_and_resolve_references()
    other.seed, other.optimizer.learning_rate, other.loss.hidden, other.sample.steps = 5, 1e-2, 0.5, 3
    return c, other


def test_only_seeds_and_numbers_may_differ(two):
    c, other = two
    assert lanes.group_key(c) == lanes.group_key(other)
    assert lanes.differing_numbers(two).keys() == {"optimizer.learning_rate", "loss.hidden"}
    for field, value in {"loss.hidden": 0.0, "model.width": 24, "train.steps": 9, "optimizer.clip": 2.0}.items():
        changed = c.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        assert lanes.group_key(changed) != lanes.group_key(c), field


@pytest.mark.slow
def test_a_lane_of_real_steps_equals_a_run_of_its_own(two):
    mesh, c = partitioning.make_mesh(1, 1, 1), two[1]
    setups = [train_step.make_setup(c) for c in two]
    table = {name: jnp.asarray(rows[:40]) for name, rows in pipeline.read_all(c).items()}
    states = [train_step.create_state(s.model, s.tx, c.seed, mesh)[0]() for s, c in zip(setups, two)]
    record, seeds = np.random.default_rng(0).integers(40, size=(1, 2, 8)), np.array([0, 5], np.uint32)
    with partitioning.scope(mesh):
        program = lanes.make_program(setups[0], two, mesh, table)
        selections = {"record": record, "flip": np.zeros(record.shape, bool)}
        together, metrics = program(lanes.stack_states(states), selections, {}, seeds)
        step = jax.jit(train_step.make_step(setups[1], c))
        alone, expected = step(states[1], {name: rows[record[0, 1]] for name, rows in table.items()}, {}, seeds[1])
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name][0, 1], value, rtol=1e-4, err_msg=name)
    for a, b in zip(jax.tree.leaves(lanes.lane_state(together, 1)), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    assert abs(metrics["loss"][0, 0] - metrics["loss"][0, 1]) > 1e-3


@pytest.fixture
def summing(monkeypatch):
    """Replaces the step by one whose result depends on the batch, the seed, the step and the learning rate."""

    def make_step(s, c, platform=None):
        def step(state, batch, codec_params, seed):
            rate = train_step.learning_rate(c)(state.step)
            loss = jnp.mean(batch["image"].astype(jnp.float32), axis=(1, 2, 3)) @ jnp.arange(len(batch["label"]))
            loss = jnp.where((seed == 7) & (state.step == 4), jnp.nan, loss)
            params = add_to_first(state.params, rate * loss)
            metrics = {"loss": loss, "grad_norm": loss + seed, "learning_rate": rate}
            return state._replace(step=state.step + 1, params=params), metrics

        return step

    monkeypatch.setattr(train_step, "make_step", make_step)


def run_lanes(configs, folder):
    return train.run_lanes(configs, [str(folder / str(i)) for i in range(len(configs))])


@pytest.mark.slow
def test_each_lane_writes_and_resumes_its_own_run(two, summing, tmp_path):
    for i, c in enumerate(two):
        train.run(c, str(tmp_path / "alone" / str(i)), grids=False)
        c.train.scan = 5
    done = run_lanes(two, tmp_path)
    assert [report["step"] for report in done] == [5, 5]
    for i in range(2):
        shutil.rmtree(tmp_path / str(i) / "checkpoints" / "5")
    assert run_lanes(two, tmp_path)[1]["loss"] == done[1]["loss"]
    for i, c in enumerate(two):
        pairs = zip(figures(tmp_path / str(i)), figures(tmp_path / "alone" / str(i)), strict=True)
        for line, expected in pairs:
            assert line == pytest.approx(expected, rel=1e-5)
        ours, expected = (final(c, folder / str(i)) for folder in (tmp_path, tmp_path / "alone"))
        assert (ours[0], ours[2]) == (5, expected[2])
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_lane_that_diverges_does_not_end_the_others(two, summing, tmp_path):
    two[1].seed = 7
    report, error = run_lanes(two, tmp_path)
    assert report["step"] == 5 and len(figures(tmp_path / "0")) == 3
    assert isinstance(error, ConfigError)
    assert "at step 5: training has diverged" in str(
        error
    ) and f"the last good checkpoint: step 4 of {tmp_path}/1" in str(error)
    assert figures(tmp_path / "1")[-1]["step"] == 4


def test_lanes_are_used_only_where_they_are_measured_to_be_faster(two, summing, tmp_path, monkeypatch):
    for c in two:
        c.train.lanes = 0
    monkeypatch.setattr(lanes, "faster_together", lambda *args: False)
    assert run_lanes(two, tmp_path) is None
    assert not (tmp_path / "0" / "metrics.jsonl").exists()
