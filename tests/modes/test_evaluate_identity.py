"""Identity of results: changed inputs give a new result, and nothing is computed twice."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.evaluation import judge, likelihood, shards
from madformer_jax.evaluation.networks import attribute_classifier, classifier
from madformer_jax.modes import evaluate
from madformer_jax.sampling import codec, generation
from tests.modes import judged

N = judged.N
data, workdir, fresh, data_images = judged.data, judged.workdir, judged.fresh, judged.data_images


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


@pytest.mark.parametrize("changed", ["noise", "weights of the codec"])
def test_changed_noise_and_codec_weights_give_a_new_result(fresh, workdir, tmp_path, monkeypatch, changed):
    """The paths stay the same."""
    noise = np.random.default_rng(0).standard_normal((2, N, *derive_sizes(fresh).block_shape))
    values = []
    for i in (0, 1, 1):
        if changed == "noise":
            np.save(tmp_path / "noise.npy", noise[i])
            fresh.sample.noise = str(tmp_path / "noise.npy")
        else:
            scaled = codec.Codec(lambda i=i: {"scale": np.float32(1 - i / 2)}, None, _decode)
            monkeypatch.setattr(codec, "build", lambda c, scaled=scaled: scaled)
        values.append(evaluate.run(fresh, str(workdir))["results"][0]["scores"]["FD-classifier"]["value"])
    assert values[0] != values[1] == values[2]
    assert len(list((workdir / "evaluations").glob("*.json"))) == 2


def _decode(params, z):
    return params["scale"] * codec.pixel(4).decode({}, z)


@pytest.mark.parametrize("kind", ["npz", "folder", "data"])
def test_changed_images_give_a_new_result(fresh, workdir, data, tmp_path, kind):
    """The names, sizes and times of the files stay the same."""
    fresh.evaluate.images = {"npz": str(tmp_path / "x.npz"), "folder": str(tmp_path / "x"), "data": "data:all"}[kind]
    fresh.data.path = str(tmp_path / "x")
    values = []
    for images in (data_images(data, "train")[:10], data_images(data, "train")[:10] // 2):
        np.savez(tmp_path / "x.npz", images=images)
        (tmp_path / "x").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            path = tmp_path / "x" / f"{i}.png"
            Image.fromarray(image[..., 0]).save(path, compress_level=0)
            os.utime(path, (1e9, 1e9))
        fresh.evaluate.n = 10
        values.append(evaluate.run(fresh, str(workdir))["results"][0]["scores"]["FD-classifier"]["value"])
    assert values[0] != values[1]


def test_changed_labels_give_a_new_result(fresh, workdir, data, tmp_path):
    """The labels `arr_1` are all correct, then half correct, then all wrong."""
    images, half = data_images(data, "all")[:N], np.arange(N) % 2
    logits = classifier.apply(classifier.load(workdir / "classifier.npz").params, images, classes=2)[1]
    right = np.asarray(logits).argmax(axis=1)
    fresh.evaluate.images, fresh.model.classes = str(tmp_path / "x.npz"), 2
    values = []
    for labels in (right, right ^ half, 1 - right):
        np.savez(tmp_path / "x.npz", arr_0=images, arr_1=labels)
        values.append(evaluate.run(fresh, str(workdir))["results"][0]["scores"]["recognised"]["value"])
    assert values == [1, 0.5, 0]
    fresh.model.classes = 0  # Without classes the labels are ignored.
    assert "recognised" not in evaluate.run(fresh, str(workdir))["results"][0]["scores"]


def test_changed_blocks_and_attribute_classifier_give_a_new_result(fresh, workdir, monkeypatch):
    """The accuracy of the attribute classifier and the images stay the same."""
    results = []
    for blocks, weight in ((1, 0), (4, 0), (4, 1)):
        fresh.model.blocks = blocks
        opened = attribute_classifier.AttributeClassifier({"w": np.full(3, weight)}, [2], accuracy=0.5, held_out=8)
        monkeypatch.setattr(judge, "_open_attribute_classifier", lambda *args, opened=opened: opened)
        fresh.evaluate.images = "data:all"
        results.append(evaluate.run(fresh, str(workdir))["results"][0])
    assert ["seam" in result["scores"] for result in results] == [False, True, True]
    assert results[1]["protocol"] != results[2]["protocol"]
    assert len(list((workdir / "evaluations").glob("*.json"))) == 3


def test_changed_captions_give_a_new_result(fresh, workdir, monkeypatch):
    opened = []

    class Captions:
        def __init__(self, c):
            opened.append(c.evaluate.split)
            self.protocol, self._bits = {"held_out": c.evaluate.split}, float(len(opened))

        def scores(self, model, params, mesh):
            return {"bits": {"value": self._bits, "low": 0.0, "high": 9.0}}

    monkeypatch.setattr(likelihood, "open_captions", Captions)
    values = []
    for split in ("test", "composition", "test"):
        fresh.evaluate.split = split
        values.append(evaluate.run(fresh, str(workdir))["results"][0]["scores"]["bits"]["value"])
    assert values == [1, 2, 1]
    assert opened == ["test", "composition", "test"]


def test_prompts_and_noise_are_read_once_for_all_settings_and_shards(fresh, workdir, tmp_path, monkeypatch):
    np.save(tmp_path / "noise.npy", np.zeros((N, *derive_sizes(fresh).block_shape), np.float32))
    fresh.sample.noise, fresh.evaluate.grid = str(tmp_path / "noise.npy"), "steps=1,2"
    read, given_noise = [], generation.open_noise
    monkeypatch.setattr(generation, "open_noise", lambda c: read.append("noise") or given_noise(c))
    tokens = TokenizedTexts(np.zeros((N, 1), np.int32), np.ones(N, np.int32))
    monkeypatch.setattr(generation.prompts, "tokenize", lambda c: read.append("prompts") or tokens)
    run = generation.batches

    def without_tokens(*args, conditions, **more):  # which this model would not take
        return run(*args, conditions=conditions._replace(texts=None), **more)

    monkeypatch.setattr(generation, "batches", without_tokens)
    results = evaluate.run(fresh, str(workdir))["results"]  # three shards each
    assert read == ["noise", "prompts"]
    assert all("tokens" in result["protocol"]["images"] for result in results)


def test_two_concurrent_evaluations_return_the_same_result(fresh, workdir, monkeypatch):
    """Without the lock, the first would remove shards that the second has written."""
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(evaluate, "_add_real_images", lambda c, workdir, judge, results: results)
    fresh.evaluate.images = "data:all"
    read, first, second, done = shards.Shards.read, threading.Event(), threading.Event(), threading.Event()

    def reads(self):
        if first.is_set():
            second.set()
            done.wait(5)
        else:
            first.set()
            second.wait(1)
        return read(self)

    monkeypatch.setattr(shards.Shards, "read", reads)

    def run(event):
        try:
            return evaluate.run(fresh, str(workdir))["results"]
        finally:
            event.set()

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(run, done)
        first.wait(20)
        other = threads.submit(run, threading.Event())
        assert one.result() == other.result()
    (path,) = (workdir / "evaluations").iterdir()
    assert path.suffix == ".json" and not second.is_set()
