"""Tests of scores and validation in training, with a step that only counts and pixels as features."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images, reference_statistics, scores
from madformer_jax.evaluation.networks import registry
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.modes import train
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import generation
from madformer_jax.training import hooks, metric_writer, train_step
from tests import tiny

N = 12


class Stub(Network):
    """A network that `make_extractor` is replaced for."""

    name, weights_file, input_sizes, feature_layer, feature_dim = "stub", "stub.npz", (), "", 4
    channels, params = (1,), {"w": np.zeros(1)}

    @classmethod
    def open(cls, path):
        return cls()


def pixels(images):
    """Returns features (n, 4)."""
    return images.reshape(len(images), -1)[:, :4].astype(np.float32)


def image(number, weight):
    return np.random.default_rng([number, int(weight)]).integers(0, 256, (32, 32, 1), dtype=np.uint8)


@pytest.fixture
def c(tmp_path, one_device, monkeypatch):
    """A run of 4 steps, saved and scored at 2 and 4. A step adds 2 to averages, 1 to parameters."""
    c = tiny.get_config("plain")
    c.train.steps, c.train.evaluate_every, c.train.evaluate_n = 4, 2, N
    c.sample.n = c.sample.batch = 5  # fewer than N
    c.evaluate.network = "stub"
    monkeypatch.setitem(registry.NETWORKS, "stub", Stub)
    monkeypatch.setattr(
        registry, "make_extractor", lambda network: lambda images: registry.NetworkOutputs(pixels(images), None)
    )
    real = np.random.default_rng(0).normal(100, 50, (20, 4)).astype(np.float32)
    rows = {"features": real, "labels": np.zeros(20, np.int32), "profile": np.zeros((1, 62)), "weight": np.ones(1)}
    protocol = {"network": Stub().describe(), "image": pipeline.make_preprocessor(c).describe()}
    reference_statistics.save(str(tmp_path / "reference.npz"), protocol, lambda: iter([rows]), 0)
    real_state = train_step.create_state

    def create_state(*args):
        abstract = real_state(*args)[1]
        zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)
        return lambda: zeros, abstract

    def step(state, batch, codec_params, seed):
        metrics = {"loss": jnp.mean(batch["image"]), "grad_norm": jnp.ones(()), "learning_rate": jnp.ones(())}
        params, ema = (jax.tree.map(lambda x, k=k: x + k, tree) for k, tree in ((1, state.params), (2, state.ema)))
        return train_step.State(state.step + 1, params, ema, state.opt), metrics

    def batches(c, sample_fn, params, codec_params, mesh, numbers, max_batch=None):
        weight = jax.tree.leaves(params)[0].ravel()[0]
        assert generation.batch_size(c, mesh, max_batch) == 5 and len(numbers) <= c.sample.n
        for number in numbers:
            yield generation.SampleBatch(
                np.array([number]), np.zeros(1, np.int32), image(number, weight)[None], np.zeros(1)
            )

    monkeypatch.setattr(train_step, "create_state", create_state)
    monkeypatch.setattr(train_step, "make_step", lambda s, c: step)
    monkeypatch.setattr(generation, "batches", batches)
    return c


def metric_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_averages_are_scored_after_their_checkpoint_and_at_the_end(c, tmp_path):
    figures = train.run(c, str(tmp_path))
    real = reference_statistics.load(str(tmp_path / "reference.npz")).features
    lines = metric_lines(tmp_path)
    assert [(line["step"], "loss" in line, line.get("scored")) for line in lines] == [
        (2, True, None), (2, False, N), (4, True, None), (4, False, N),
    ]  # fmt: skip
    for line in lines[1::2]:
        drawn = np.stack([image(number, 2 * line["step"]) for number in range(N)])
        assert line["FD-stub"] == pytest.approx(scores.frechet(pixels(drawn), real))
        assert {"KID-stub", "precision-stub", "recall-stub"} <= line.keys()
    assert figures == lines[2] | lines[3]
    assert train.run(c, str(tmp_path)).items() >= {"FD-stub": lines[3]["FD-stub"], "loss": figures["loss"]}.items()


def test_error_in_scoring_does_not_end_training(c, tmp_path, monkeypatch, caplog):
    def extract(images):
        with checkpoint.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
            seen.append(checkpoints.steps[-1])
        raise RuntimeError("no features\nof this")

    seen = []
    monkeypatch.setattr(registry, "make_extractor", lambda network: extract)
    assert train.run(c, str(tmp_path))["step"] == 4
    assert seen == [2, 4]  # Each step is saved before it is scored.
    assert "the scores of step 2 are left out: no features" in caplog.text
    assert ["scored" in line for line in metric_lines(tmp_path)] == [False, False]
    # Other processes without the error would wait for the features of this one.
    monkeypatch.setattr(partitioning, "all_failed", lambda: False)
    with pytest.raises(RuntimeError, match="no features"):
        train.run(c, str(tmp_path))


def test_lost_metrics_are_not_an_error_of_a_hook(tmp_path, monkeypatch):
    class Picture(hooks.Hook):
        description = "pictures"

        def _run(self, step, state, stop):
            writer.save_png(tmp_path / "a.png", np.zeros((2, 2, 1), np.uint8))

    def append(path, text):
        later.wait()
        raise OSError("Stale file handle")

    later = threading.Event()
    monkeypatch.setattr(metric_writer.storage, "append_line", append)
    monkeypatch.setattr(metric_writer.flops, "peak_rate", lambda dtype: 1e9)
    c = tiny.get_config("plain")
    writer = metric_writer.MetricWriter(c, str(tmp_path), 0, 1.0, 1)
    writer.add(1, {"loss": np.ones(()), "grad_norm": np.ones(()), "learning_rate": np.ones(())})
    writer.write()
    later.set()
    writer._thread.submit(lambda: None).result()  # behind the failed write
    with pytest.raises(ConfigError, match="metrics.jsonl cannot be written"):
        Picture(c, hooks.TrainContext(None, None, None, None, writer)).run(1, None, lambda: False)
    writer.close()


def test_stop_signal_ends_scoring_between_batches(c, tmp_path, monkeypatch):
    def extract(images):
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(len(images))
        return registry.NetworkOutputs(pixels(images), None)

    seen = []
    monkeypatch.setattr(registry, "make_extractor", lambda network: extract)
    assert train.run(c, str(tmp_path))["step"] == 2
    assert seen == [1] and "scored" not in metric_lines(tmp_path)[-1]


def test_missing_reference_is_refused_at_the_start(c, tmp_path, monkeypatch):
    (tmp_path / "reference.npz").unlink()
    monkeypatch.setattr(pipeline, "dataset_info", lambda c: pytest.fail("started"))
    with pytest.raises(ConfigError, match="the reference .*reference.npz does not exist: make it") as error:
        train.run(c, str(tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_validation_divides_the_text_loss_by_the_tokens_of_all_batches():
    """Uses batches of 3, 1 and 0 predicted tokens; the last one has no weight."""
    metrics = [{"loss": 10.0, "loss_text": 2.0}, {"loss": 20.0, "loss_text": 6.0}, {"loss": 30.0, "loss_text": 0.0}]
    mean = metric_writer._mean_metrics(hooks._average_text_loss(metrics, [3, 1, 0], weight=0.5))
    assert mean["loss_text"] == 3.0
    assert mean["loss"] == pytest.approx((10 - 1 + 20 - 3 + 30 - 0) / 3 + 0.5 * 3.0)
    without = [{"loss": 1.0, "loss_q1": 2.0}]
    assert hooks._average_text_loss(without, [0], weight=0.5) is without


def test_validation_uses_held_out_images_and_fixed_noise(c, tmp_path, monkeypatch):
    """Validates the averages on the same images with the same noise each time."""
    c.train.evaluate_every, c.train.validate_every, c.train.validate_n = 0, 2, 12  # 2 batches of 8
    seen = []

    def make_loss(s, c, dropout):
        assert dropout == 0.0

        def loss(params, batch, codec_params, key):
            value = jnp.mean(batch["image"] / 255) + jax.tree.leaves(params)[0].ravel()[0] + jax.random.uniform(key)
            return value, {"loss": value, "loss_q1": jnp.nan}

        return loss

    real = pipeline.train_iterator

    class Recorded:
        def __init__(self, batches):
            self.batches, self.close = batches, batches.close

        def __next__(self):
            batch = next(self.batches)
            seen.append(batch["image"])
            return batch

    def open_data(c, validation=False, **share):
        batches = real(c, validation=validation, **share)
        return Recorded(batches) if validation else batches

    monkeypatch.setattr(pipeline, "train_iterator", open_data)
    monkeypatch.setattr(train_step, "make_loss", make_loss)
    figures = train.run(c, str(tmp_path), grids=False)
    lines = [line for line in metric_lines(tmp_path) if "validated" in line]
    assert [(line["step"], line["validated"]) for line in lines] == [
        (2, 16),
        (4, 16),
    ] and "validation_loss_q1" not in figures
    # Each of the two steps between adds 2 to the averages.
    assert lines[1]["validation_loss"] - lines[0]["validation_loss"] == pytest.approx(4)
    assert figures["validation_loss"] == lines[1]["validation_loss"] and "loss" in figures
    np.testing.assert_array_equal(seen[:2], seen[2:])
    key = jax.random.fold_in(jax.random.key(c.seed), hooks.VALIDATION_STREAM)
    noise = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(2)]
    assert lines[0]["validation_loss"] == pytest.approx(np.mean(seen[:2]) / 255 + 4 + np.mean(noise), rel=1e-5)
    trained = {x.tobytes() for x in images.from_source(c, "train", shuffled=False).read(np.arange(4000)).images}
    assert not {x.tobytes() for batch in seen for x in batch} & trained
    c.evaluate.split = "none"
    with pytest.raises(ConfigError, match="none"):
        train.run(c, str(tmp_path / "other"))
