"""What identifies a score: whatever decides it, under its old name, gives another result; and nothing is computed or read twice."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.evaluation import likelihood, sample_scores, shards
from madformer_jax.evaluation.networks import attribute_classifier, classifier
from madformer_jax.modes import evaluate
from madformer_jax.sampling import codec, generation
from tests.modes import judged

N = judged.N
data, workdir, fresh, data_images = judged.data, judged.workdir, judged.fresh, judged.data_images


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


@pytest.mark.parametrize("what", ["noise", "weights of the codec"])
def test_other_noise_and_other_weights_of_the_codec_are_judged_anew(fresh, workdir, tmp_path, monkeypatch, what):
    """Under the old paths."""
    noise = np.random.default_rng(0).standard_normal((2, N, *derive_sizes(fresh).block_shape))
    values = []
    for i in (0, 1, 1):
        if what == "noise":
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
def test_other_images_under_the_old_names_are_judged_anew(fresh, workdir, data, tmp_path, kind):
    """The files have their old sizes and times too."""
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


def test_other_labels_of_the_same_images_are_judged_anew(fresh, workdir, data, tmp_path):
    """`arr_1` of a file of guided-diffusion's, of which the labels are a half right and then all wrong."""
    images, half = data_images(data, "all")[:N], np.arange(N) % 2
    logits = classifier.apply(classifier.load(workdir / "classifier.npz").params, images, classes=2)[1]
    right = np.asarray(logits).argmax(axis=1)
    fresh.evaluate.images, fresh.model.classes = str(tmp_path / "x.npz"), 2
    values = []
    for labels in (right, right ^ half, 1 - right):
        np.savez(tmp_path / "x.npz", arr_0=images, arr_1=labels)
        values.append(evaluate.run(fresh, str(workdir))["results"][0]["scores"]["recognised"]["value"])
    assert values == [1, 0.5, 0]
    fresh.model.classes = 0  # labels say nothing without classes
    assert "recognised" not in evaluate.run(fresh, str(workdir))["results"][0]["scores"]


def test_other_blocks_and_another_reader_of_attributes_are_judged_anew(fresh, workdir, monkeypatch):
    """The reader has its old accuracy, and the images are the same ones."""
    found = []
    for blocks, weight in ((1, 0), (4, 0), (4, 1)):
        fresh.model.blocks = blocks
        reads = attribute_classifier.AttributeClassifier({"w": np.full(3, weight)}, [2], accuracy=0.5, held_out=8)
        monkeypatch.setattr(sample_scores, "_open_attribute_classifier", lambda *given, reads=reads: reads)
        fresh.evaluate.images = "data:all"
        found.append(evaluate.run(fresh, str(workdir))["results"][0])
    assert ["seam" in result["scores"] for result in found] == [False, True, True]
    assert found[1]["protocol"] != found[2]["protocol"]
    assert len(list((workdir / "evaluations").glob("*.json"))) == 3


def test_other_captions_are_judged_anew(fresh, workdir, monkeypatch):
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


def test_prompts_and_noise_are_read_once_for_all_settings_and_parts(fresh, workdir, tmp_path, monkeypatch):
    np.save(tmp_path / "noise.npy", np.zeros((N, *derive_sizes(fresh).block_shape), np.float32))
    fresh.sample.noise, fresh.evaluate.grid = str(tmp_path / "noise.npy"), "steps=1,2"
    read, given_noise = [], generation.open_noise
    monkeypatch.setattr(generation, "open_noise", lambda c: read.append("noise") or given_noise(c))
    tokens = TokenizedTexts(np.zeros((N, 1), np.int32), np.ones(N, np.int32))
    monkeypatch.setattr(generation.prompts, "texts", lambda c: read.append("prompts") or tokens)
    run = generation.batches

    def without_tokens(*args, conditions, **more):  # which this model would not take
        return run(*args, conditions=conditions._replace(texts=None), **more)

    monkeypatch.setattr(generation, "batches", without_tokens)
    results = evaluate.run(fresh, str(workdir))["results"]  # three parts each
    assert read == ["noise", "prompts"]
    assert all("tokens" in result["protocol"]["images"] for result in results)


def test_two_evaluations_of_a_setting_at_the_same_time_both_have_the_result(fresh, workdir, monkeypatch):
    """The first one waits, as far as it may, until the second has written its parts, which it then removes."""
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.05)
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
