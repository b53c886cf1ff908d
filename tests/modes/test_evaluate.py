"""--mode=reference and --mode=evaluate with an untrained model and classifier."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import reference_statistics, sample_scores, scores, shards
from madformer_jax.evaluation.networks import classifier
from madformer_jax.modes import evaluate
from madformer_jax.modes import reference as reference_mode
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import generation
from tests.modes import judged

N, BLACK = judged.N, np.zeros((judged.N, 32, 32, 1), np.uint8)
data, workdir, fresh, data_images = judged.data, judged.workdir, judged.fresh, judged.data_images


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


def _file(workdir):
    (path,) = (workdir / "evaluations").glob("*.json")
    return json.loads(path.read_text())


def test_reference_holds_the_test_split_and_how_it_was_made(workdir, data):
    reference = reference_statistics.load(str(workdir / "reference.npz"))
    with np.load(workdir / "reference.npz") as file:
        n, counts = len(file["features"]), file["counts"]
        np.testing.assert_allclose(file["mu"], file["features"].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(file["features"], rowvar=False), rtol=1e-4, atol=1e-8)
    assert 8 < n < 32 and counts.sum() == n and len(counts) == 2
    assert reference.protocol["n"] == n and reference.protocol["split"] == "test"
    assert reference.protocol["network"]["name"] == "classifier" and reference.protocol["image"]["size"] == 32
    assert not list((workdir / "references").glob("*"))
    images = data_images(data, "test")
    features = classifier.apply(classifier.load(workdir / "classifier.npz").params, images, classes=2)[0]
    np.testing.assert_allclose(np.sort(features, axis=0), np.sort(reference.features, axis=0), rtol=1e-4, atol=1e-5)


def test_a_killed_evaluation_gives_the_file_of_an_undisturbed_one(fresh, workdir, monkeypatch, capsys):
    whole = evaluate.run(fresh, str(workdir))["results"][0]
    assert "| FD-classifier | KID-classifier | IS-classifier | precision-classifier |" in capsys.readouterr().out
    assert whole["scores"].keys() >= {"FD-classifier", "KID-classifier", "IS-classifier", "recall-classifier"}
    for score in whole["scores"].values():
        assert score["low"] <= score["value"] <= score["high"]
    undisturbed = _file(workdir)
    (path,) = (workdir / "evaluations").glob("*.json")
    path.unlink()
    drawn, batches, savez = [], generation.batches, np.savez
    monkeypatch.setattr(generation, "batches", lambda *a, **k: drawn.append([*a[5]]) or batches(*a, **k))

    def dies(file, **arrays):
        """Fails while it writes the third shard."""
        if len(drawn) == 3:
            file.write(b"PK")
            raise KeyboardInterrupt
        savez(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(fresh, str(workdir))
    (half,) = (workdir / "evaluations").glob("*/part_0000008_*.npz")
    half.write_bytes(half.read_bytes()[:1000])  # as after a power failure
    (half.parent / ".part_0000016_0000020.npz.0123abcd.part").write_bytes(b"PK")  # as after a kill
    evaluate.run(fresh, str(workdir))
    first, *rest = [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    assert drawn == [first, *rest, *rest]
    again = _file(workdir)
    assert again["cost"].pop("seconds") > 0 and undisturbed["cost"].pop("seconds") > 0
    assert again == undisturbed
    assert [x.name for x in (workdir / "evaluations").iterdir()] == [path.name]
    half.parent.mkdir()
    half.write_bytes(b"PK")  # as after a kill between the result and the removal of its shards
    evaluate.run(fresh, str(workdir))
    assert [x.name for x in (workdir / "evaluations").iterdir()] == [path.name] and len(drawn) == 5


def test_a_grid_compiles_each_program_once_and_computes_nothing_twice(fresh, workdir, monkeypatch, capsys):
    made, make_draw = [], generation.make_sample_fn
    monkeypatch.setattr(generation, "make_sample_fn", lambda c, *a: made.append(c.sample.steps) or make_draw(c, *a))
    fresh.evaluate.grid = "steps=2,1; weights=raw,ema"
    fresh.evaluate.checkpoints = "last:2"
    results = evaluate.run(fresh, str(workdir))["results"]
    assert [tuple(r["protocol"]["images"][k] for k in ("step", "steps", "weights")) for r in results] == [
        (step, steps, weights) for step in (1, 2) for steps in (2, 1) for weights in ("raw", "ema")
    ]
    assert made == [2]  # one program for both numbers of steps
    assert results[0]["scores"] == results[1]["scores"] != results[2]["scores"]
    out = capsys.readouterr().out.splitlines()
    assert "| step | weights | steps |" in out[0] and len(out) == 2 + 8 + 4 + 1 and "mean of 2" in out[-2]
    monkeypatch.setattr(evaluate, "_sample_and_extract", lambda *a: pytest.fail("drawn again"))
    assert evaluate.run(fresh, str(workdir))["results"] == results
    assert "| solver_steps | nfe | passes | seconds |" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["npz", "shards", "shards without classes", "folder", "data"])
def test_images_that_exist(fresh, workdir, data, tmp_path, kind):
    images = np.concatenate([data_images(data, "train"), data_images(data, "test")])[:N]
    if kind == "npz":
        np.savez_compressed(tmp_path / "x.npz", arr_0=images)
        name = str(tmp_path / "x.npz")
    elif kind.startswith("shards"):
        fresh.model.classes = 2 if kind == "shards" else 0
        (tmp_path / "x").mkdir()
        np.savez(tmp_path / "x" / "0.npz", images=images[:7], labels=np.zeros(7))
        np.savez(tmp_path / "x" / "1.npz", images=images[7:], labels=np.ones(N - 7))
        name = str(tmp_path / "x")
    elif kind == "folder":
        (tmp_path / "x").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[..., 0]).save(tmp_path / "x" / f"{i:03d}.png")
        name = str(tmp_path / "x")
    else:
        name = "data:all"
    fresh.evaluate.images = name
    result = evaluate.run(fresh, str(workdir))["results"][0]
    assert "cost" not in result
    assert ("recognised" in result["scores"]) == (kind in ("shards", "data"))
    if kind != "data":
        features = classifier.apply(classifier.load(workdir / "classifier.npz").params, images, classes=2)[0]
        real = reference_statistics.load(str(workdir / "reference.npz")).features
        assert result["scores"]["FD-classifier"]["value"] == pytest.approx(scores.frechet(features, real), rel=1e-4)
    before = result["scores"]["FD-classifier"]["value"]
    values = []
    for how in ("blur:1", "blur:4"):
        fresh.evaluate.degrade = how
        values.append(evaluate.run(fresh, str(workdir))["results"][0]["scores"]["FD-classifier"]["value"])
    assert before != values[0] < values[1]


def test_images_that_cannot_be_read_are_named_and_left_out_until_they_are_too_many(fresh, workdir, data, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(data / "class1", folder)
    (folder / "17.png").write_bytes(b"nothing")
    fresh.evaluate.images, fresh.evaluate.split = str(folder), "all"
    fresh.evaluate.reference, fresh.data.max_corrupt = str(tmp_path / "other.npz"), 0.04
    fresh.data.path = str(folder)
    for mode in (reference_mode, evaluate):
        with pytest.raises(
            ConfigError, match="17.png .* cannot be read: 1 of 20 images, more than .*max_corrupt"
        ) as error:
            mode.run(fresh, str(workdir))
        assert "\n" not in str(error.value)
        fresh.evaluate.reference = ""
    fresh.data.max_corrupt = 0.05
    assert evaluate.run(fresh, str(workdir))["results"][0]["protocol"]["n"] == N - 1
    fresh.evaluate.reference = str(tmp_path / "other.npz")
    reference_mode.run(fresh, str(workdir))
    assert reference_statistics.load(fresh.evaluate.reference).protocol["n"] == N - 1


def test_shards_are_removed_when_every_process_has_read_them(fresh, workdir, monkeypatch):
    order, read, remove, sync = [], shards.Shards.read, shards.Shards.remove, partitioning.sync
    monkeypatch.setattr(shards.Shards, "read", lambda self: order.append("read") or read(self))
    monkeypatch.setattr(shards.Shards, "remove", lambda self: order.append("remove") or remove(self))
    monkeypatch.setattr(evaluate, "_add_real_images", lambda c, workdir, judge, results: results)
    monkeypatch.setattr(partitioning, "sync", lambda name: order.append("sync") or sync(name))
    fresh.evaluate.images = "data:all"
    evaluate.run(fresh, str(workdir))
    assert order == ["sync", "read", "sync", "remove"]


def test_kept_features_give_the_same_scores_again(fresh, workdir, monkeypatch):
    fresh.evaluate.images = "data:all"
    evaluate.run(fresh, str(workdir))
    fresh.evaluate.keep_features = True
    (result,) = evaluate.run(fresh, str(workdir))["results"]
    judge = evaluate.open_judge(fresh, str(workdir), fresh.evaluate.n)
    (path,) = (workdir / "evaluations").glob("*.npz")
    with np.load(path) as file:
        assert len(file["features"]) == N
        recomputed = sample_scores.compute_scores(fresh, judge, dict(file), labeled=True)
    assert recomputed == result["scores"]
    monkeypatch.setattr(evaluate, "_make_result", None)  # neither is made again
    assert evaluate.run(fresh, str(workdir))["results"] == [result]


def test_statistics_alone_give_the_frechet_distance(fresh, workdir, tmp_path):
    with np.load(workdir / "reference.npz") as file:
        np.savez(tmp_path / "adm.npz", mu=file["mu"], sigma=file["sigma"])
    fresh.evaluate.images = "data:all"
    expected = evaluate.run(fresh, str(workdir))["results"][0]["scores"]
    fresh.evaluate.reference = str(tmp_path / "adm.npz")
    actual = evaluate.run(fresh, str(workdir))["results"][0]["scores"]
    assert actual["FD-classifier"]["value"] == pytest.approx(expected["FD-classifier"]["value"], rel=1e-3)
    missing = {"KID-classifier", "precision-classifier", "recall-classifier", "seam_difference"}
    assert set(expected) - set(actual) == missing


def test_copies_of_training_images_are_found_and_drawn(fresh, workdir, data, tmp_path):
    training = fresh.copy_and_resolve_references()
    training.evaluate.split, training.evaluate.reference = "train", str(tmp_path / "train.npz")
    reference_mode.run(training, str(workdir))
    fresh.evaluate.training = str(tmp_path / "train.npz")
    fresh.evaluate.n = 10
    values = []
    for split in ("train", "test"):
        fresh.evaluate.images = f"data:{split}"
        result = evaluate.run(fresh, str(workdir))["results"][0]
        scores_of_split = result["scores"]
        values.append((scores_of_split["memorisation"]["value"], scores_of_split["memorized"]["value"]))
        if split == "train":
            pairs = scores_of_split["memorized"]["pairs"]
            (picture,) = (workdir / "evaluations").glob("*.png")
            columns = np.split(np.asarray(Image.open(picture)).reshape(2, 32, -1), len(pairs), axis=2)
            images = data_images(data, "train")
            for (_, number, distance), (sample, nearest) in zip(pairs, columns):
                np.testing.assert_array_equal(nearest, images[number][..., 0])
                assert distance < 1e-4
                np.testing.assert_array_equal(sample, nearest)
    assert values[0][0] < 1e-4 and 0.5 < values[1][0] < 2
    assert values[0][1] == 1 and values[1][1] < 0.5
    assert result["real"]["scores"]["memorisation"]["value"] == 1  # of the images of the reference


def test_real_images_are_the_last_row_and_scored_once_for_each_reference(fresh, workdir, tmp_path, monkeypatch, capsys):
    fresh.evaluate.n = 10
    real = evaluate.run(fresh, str(workdir))["results"][0]["real"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("| real | ")
    fresh.evaluate.images = "data:train"
    (tmp_path / "other").mkdir()
    fresh.evaluate.reference, fresh.evaluate.network_path = (
        str(workdir / x) for x in ("reference.npz", "classifier.npz")
    )
    extracted, extract = [], evaluate.images.extract_missing_shards
    monkeypatch.setattr(evaluate.images, "extract_missing_shards", lambda *x: extracted.append(x) or extract(*x))
    (result,) = evaluate.run(fresh, str(tmp_path / "other"))["results"]
    assert len(extracted) == 1  # the images themselves
    assert result["real"] == real and result["scores"] == real["scores"]
    fresh.evaluate.images, fresh.evaluate.n = "data:all", 40  # more than the training images
    assert "real" not in evaluate.run(fresh, str(workdir))["results"][0]
    assert "| real |" not in capsys.readouterr().out.splitlines()[-1]


def _set(*fields):
    """Sets fields of `evaluate`, each a name and a value."""

    def change(c, workdir, tmp_path):
        for name, value in zip(fields[::2], fields[1::2]):
            c.evaluate[name] = value.format(tmp=tmp_path, run=workdir) if isinstance(value, str) else value

    return change


def _other_images(c, workdir, tmp_path):
    c.data.crop = False


def _reference(field="reference", changed=False, **arrays):
    """Names a file of these arrays, or of those of the workdir's reference with these instead."""

    def change(c, workdir, tmp_path):
        with np.load(workdir / "reference.npz") as file:
            np.savez(tmp_path / "adm.npz", **((dict(file) if changed else {}) | arrays))
        c.evaluate[field] = str(tmp_path / "adm.npz")

    return change


def _other_network(c, workdir, tmp_path):
    params = classifier.init(jax.random.key(1), classes=2, channels=1)
    classifier.save(tmp_path / "other.npz", classifier.Classifier(params, 2, 1, 0.5, 8))
    c.evaluate.network_path = str(tmp_path / "other.npz")


def _images(classes=0, **arrays):
    def change(c, workdir, tmp_path):
        c.model.classes = classes
        np.savez(tmp_path / "x.npz", **arrays)
        c.evaluate.images = str(tmp_path / "x.npz")

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_set("reference", "{tmp}/none.npz"), "the reference .*none.npz does not exist: make it with --mode=reference"),
        (_set("network", "dino"), "'dino' is unknown: one of 'inception', 'attributes', 'classifier'"),
        (_set("network_path", "{tmp}/none.npz"), "no such file"),
        (_set("n", 9), "n=9 images are too few"),
        (_set("checkpoints", "7"), "no step 7, only"),
        (_set("checkpoints", "best"), "must be 'newest'"),
        (_set("checkpoints", "last:3"), "there are 2"),
        (_set("grid", "step=1"), "is not a setting"),
        (_set("grid", "steps=few"), "steps takes int"),
        (_set("grid", "steps=1;steps=2"), "names steps twice"),
        (_set("grid", "solver=karras"), "sample.solver='karras' is unknown"),
        (_set("grid", "guidance_interval=200"), "guidance_interval takes low:high"),
        (_set("grid", "guidance_interval=0:600"), r"guidance_interval=\(0, 600\) needs a class-conditional model"),
        (_set("images", "data:some"), "'some' is unknown"),
        (_set("images", "{tmp}"), "config.evaluate.images='/.*' holds no image"),
        (_set("images", "{tmp}/none.npz"), "config.evaluate.images='/.*/none.npz' does not exist"),
        (_set("images", "LICENSE"), "config.evaluate.images='LICENSE' is neither a .npz file nor a folder"),
        (_other_network, "network weights"),
        (_other_images, "image crop True, and here it is False"),
        (_reference(mu=np.zeros(3), sigma=np.eye(3)), "network dims 3"),
        (_reference(x=np.zeros(3)), "no mu and sigma, only x"),
        (_set("reference", "LICENSE"), "cannot be read"),
        (_reference(changed=True, features=np.full((9, 64), np.nan, np.float32)), "of 9 of 9 images are not finite"),
        (_reference(changed=True, features=np.zeros((9, 3), np.float32)), "3 features"),
        (_reference(changed=True, mu=np.full(64, np.inf)), "not finite"),
        (_reference(changed=True, protocol=np.array("{")), "cannot be read"),
        (_reference(changed=True, protocol=np.array("3")), "cannot be read"),
        (_set("training", "{run}/reference.npz"), "is the reference itself"),
        (_reference("training", mu=np.zeros(64), sigma=np.eye(64)), "has no features"),
        (_set("degrade", "noise:16"), "name them in evaluate.images"),
        (_set("images", "data:all", "grid", "steps=1"), "set one"),
        (_images(images=BLACK, labels=np.zeros(3)), r"labels are \(3,\) for 20 images"),
        (_images(images=BLACK, labels=np.full(N, 0.5), classes=2), "must be whole numbers from 0"),
        (_images(images=BLACK, labels=np.full(N, -1), classes=2), "must be whole numbers from 0"),
        (_images(images=np.zeros((N, 32, 32, 1), np.float32)), "must be uint8"),
        (_images(images=np.zeros((N, 16, 16, 1), np.uint8)), "the config's are"),
        (_images(images=np.zeros((5, 32, 32, 1), np.uint8)), "there are only 5 images"),
    ],
)
def test_bad_input_is_an_error_of_one_line_before_sampling(fresh, workdir, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(generation, "batches", None)
    change(fresh, workdir, tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        evaluate.run(fresh, str(workdir))
    assert "\n" not in str(error.value)
    assert not (workdir / "evaluations").exists()


def test_the_classifier_needs_labeled_images(fresh, data, tmp_path):
    fresh.data.path = str(data / "class0")
    with pytest.raises(ConfigError, match="needs labeled images"):
        reference_mode.run(fresh, str(tmp_path))


def test_a_network_of_other_channels_is_refused_before_anything_is_written(fresh, workdir, tmp_path):
    fresh.data.channels, fresh.evaluate.reference = 3, str(tmp_path / "other.npz")
    with pytest.raises(ConfigError, match="channels=3: the network .*classifier.npz takes images of 1: set that"):
        reference_mode.run(fresh, str(workdir))
    fresh.data.channels, fresh.data.source, fresh.evaluate.network = 1, "drawings", "attributes"
    with pytest.raises(ConfigError, match="channels=1: the attribute classifier needs color pictures"):
        reference_mode.run(fresh, str(workdir))
    assert not list(workdir.glob("references/*"))
