import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from madformer_jax import training
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.modes import train
from madformer_jax.runtime import checkpoint, partitioning
from tests import tiny
from tests.kill import final


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def plain_config():
    """The tiny model without its depth, for what is not about the model."""
    return tiny.get_config("plain")


def steps(config, mesh_sizes, n=5, platform="cpu"):
    """Losses and the state, on the host, after n steps on a mesh of the first devices, made for `platform`."""
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh_sizes
    mesh = partitioning.make_mesh(*mesh_sizes, jax.devices()[: int(np.prod(mesh_sizes))])
    s = training.setup(config)
    create, abstract = training.create_state(s.model, s.tx, config.seed, mesh)
    data = pipeline.train_iterator(config, batch=config.train.batch, process_index=0, process_count=1)
    losses = []
    with partitioning.scope(mesh):
        state = create()
        out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), None)
        step = jax.jit(training.make_step(s, config, platform), out_shardings=out_shardings)
        for _ in range(n):
            state, metrics = step(state, partitioning.global_batch(next(data), mesh), {})
            losses.append(float(metrics["loss"]))
    data.close()
    return losses, jax.device_get(state)


@pytest.fixture(scope="module")
def single_device_run():
    return {}


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_trains_as_a_single_device_does(tiny_config, mesh, single_device_run):
    tiny_config.model.unet_channels, tiny_config.model.unet_attention = (8, 16), (False, True)
    tiny_config.model.blocks = 2  # half the attention to compile
    if not single_device_run:
        single_device_run["result"] = steps(tiny_config, (1, 1, 1))
    losses, state = single_device_run["result"]
    sharded_losses, sharded = steps(tiny_config, mesh)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.params)]) for s in (sharded, state))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_state_is_split_over_fsdp_and_tensor(tiny_config):
    mesh = partitioning.make_mesh(1, 4, 2)
    s = training.setup(tiny_config)
    create, _abstract = training.create_state(s.model, s.tx, 0, mesh)
    state = create()
    whole = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert partitioning.device_bytes(state.params) < 0.5 * whole
    for tree in (state.ema, state.opt[1][0].mu, state.opt[1][0].nu):
        assert jax.tree.map(lambda x: x.sharding.spec, tree) == jax.tree.map(lambda x: x.sharding.spec, state.params)


def test_interrupted_and_resumed_training_equals_uninterrupted_bit_for_bit(plain_config, tmp_path, one_device):
    train.run(plain_config, str(tmp_path / "whole"))
    asked = []

    def stop_once(self, step):
        asked.append(step)
        return step == 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Preemption, "reached", stop_once)
        train.run(plain_config, str(tmp_path / "parts"))
    assert asked == [1, 2, 3]
    assert final(plain_config, tmp_path / "parts")[0] == 3
    train.run(plain_config, str(tmp_path / "parts"))
    step, trees, data = final(plain_config, tmp_path / "parts")
    other_step, other_trees, other_data = final(plain_config, tmp_path / "whole")
    assert step == other_step == plain_config.train.steps
    assert data == other_data
    assert_identical(trees, other_trees)
    assert sorted(p.name for p in (tmp_path / "whole" / "samples").iterdir()) == ["step_000006_ema.png"]


def test_sigterm_saves_and_ends_the_run(plain_config, tmp_path, one_device, monkeypatch):
    class Interrupting:
        """The data iterator; the third batch comes with a SIGTERM."""

        def __init__(self, real):
            self._real = real
            self.get_state, self.set_state, self.close = real.get_state, real.set_state, real.close
            self._count = 0

        def __next__(self):
            self._count += 1
            if self._count == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self._real)

    real = pipeline.train_iterator
    monkeypatch.setattr(pipeline, "train_iterator", lambda *a, **k: Interrupting(real(*a, **k)))
    before = signal.getsignal(signal.SIGTERM)
    train.run(plain_config, str(tmp_path))
    assert final(plain_config, tmp_path)[0] == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(plain_config, tmp_path, one_device, monkeypatch):
    real = training.losses.training_loss

    def diverging(model, params, z, tokens, key, weights):
        loss, metrics = real(model, params, z, tokens, key, weights)
        bad = jnp.where(jnp.mean(z) < diverging.below, jnp.nan, 1.0)
        return loss * bad, metrics | {"loss": loss * bad}

    data = pipeline.train_iterator(plain_config, batch=8, process_index=0, process_count=1)
    means = [float(next(data)["image"].mean()) for _ in range(plain_config.train.steps)]
    data.close()
    worst = int(np.argmin(means[2:])) + 3  # the darkest batch behind the first checkpoint
    diverging.below = np.sort(means[2:])[0] + 1e-6
    if min(means[:2]) < diverging.below:
        pytest.fail("choose another seed: the batches before the first checkpoint must train")
    monkeypatch.setattr(training.losses, "training_loss", diverging)
    good = (worst - 1) // 2 * 2
    with pytest.raises(ConfigError, match=f"at step {worst}: .* last good checkpoint: step {good} of"):
        train.run(plain_config, str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(partitioning.jax, "devices", lambda *a: jax.local_devices()[:1])
    step, trees, _ = final(plain_config, tmp_path)
    assert step == good
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trees))


@pytest.mark.parametrize(
    ("field", "value"), [("model.width", 8), ("train.batch", 4), ("seed", 1), ("loss.hidden", 0.5), ("data.flip", True)]
)
def test_a_workdir_of_another_config_is_refused_by_field(tiny_config, tmp_path, one_device, field, value):
    checkpoint.write_config(tiny_config, str(tmp_path))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)  # without one, a config binds nobody
    tiny_config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=rf"config\.{field} was .* and is {value}") as error:
        train.run(tiny_config, str(tmp_path))
    assert "\n" not in str(error.value)


def test_cadence_sampling_and_mesh_may_change_between_runs(tiny_config, tmp_path):
    checkpoint.write_config(tiny_config, str(tmp_path))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    tiny_config.train.log_every, tiny_config.sample.n, tiny_config.mesh.fsdp, tiny_config.data.workers = 1, 3, 2, 1
    checkpoint.check_config(tiny_config, str(tmp_path))


def test_a_microbatch_that_the_devices_do_not_divide_is_refused(tiny_config, tmp_path):
    tiny_config.mesh.data, tiny_config.train.accumulate = 8, 2
    with pytest.raises(ConfigError, match="a microbatch of 4 images"):
        train.run(tiny_config, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # unrolled, in a loop
def test_accumulated_gradients_are_those_of_the_whole_batch(plain_config, platform, monkeypatch):
    """With a loss that draws nothing: with the real one, other microbatches mean other noise."""

    def plain(model, params, z, tokens, key, weights):
        middle = z[:, :, z.shape[2] // 2]  # few enough values that the order of their sum is below the tolerance
        loss = sum(jnp.mean(jnp.square(p)) for p in jax.tree.leaves(params)) * jnp.mean(jnp.square(middle))
        return loss, {"loss": loss}

    monkeypatch.setattr(training.losses, "training_loss", plain)
    losses, state = steps(plain_config, (1, 1, 1), n=2)
    plain_config.train.accumulate = 4
    parts_losses, parts = steps(plain_config, (1, 1, 1), n=2, platform=platform)
    np.testing.assert_allclose(parts_losses, losses, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_ema_warms_up_towards_its_target(plain_config):
    plain_config.train.ema_decay = 0.15
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    s = training.setup(plain_config)
    create, _ = training.create_state(s.model, s.tx, 0, mesh)
    data = pipeline.train_iterator(plain_config, batch=8, process_index=0, process_count=1)
    step, state = jax.jit(training.make_step(s, plain_config)), create()
    ema = state.ema
    for decay in (1 / 10, 0.15, 0.15):  # (1 + step) / (10 + step), until it meets the target
        state, _ = step(state, next(data), {})
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, ema, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, ema)
    data.close()


def test_learning_rate_schedules(tiny_config):
    c = tiny_config
    c.train.steps, c.optimizer.learning_rate, c.optimizer.warmup, c.optimizer.decay = 1000, 2.0, 0.01, 0.15
    wsd = training.learning_rate(c)
    np.testing.assert_allclose([wsd(0), wsd(4), wsd(9), wsd(500), wsd(850)], [0.2, 1.0, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([wsd(925), wsd(1000)], [2 * 0.5**3, 2 * 0.5**6], rtol=1e-5)
    c.optimizer.schedule = "cosine"
    cosine = training.learning_rate(c)
    np.testing.assert_allclose([cosine(0), cosine(10), cosine(505), cosine(1000)], [0.2, 2.0, 1.0, 0.0], atol=1e-6)
    c.optimizer.schedule = "constant"
    np.testing.assert_allclose(training.learning_rate(c)(999), 2.0)


def test_gradients_are_clipped_by_their_global_norm(tiny_config):
    tiny_config.optimizer.clip = 0.5
    tx = training.optimizer(tiny_config)
    big = {"a": jnp.full((3,), 100.0), "b": jnp.full((5,), -100.0)}
    scaled = jax.tree.map(lambda g: g * 0.5 / optax.global_norm(big), big)
    params = jax.tree.map(jnp.zeros_like, big)
    got, _ = tx.update(big, tx.init(params), params)
    want, _ = tx.update(scaled, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_the_stored_config_is_json_with_all_fields(tiny_config, tmp_path):
    checkpoint.write_config(tiny_config, str(tmp_path / "new"))
    stored = json.loads((tmp_path / "new" / "config.json").read_text())
    assert stored["model"]["unet_channels"] == [8]
