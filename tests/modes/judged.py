"""Fixtures for the tests of --mode=evaluate, with an untrained model and classifier."""

import jax
import numpy as np
import pytest
from PIL import Image

from madformer_jax.evaluation import images, shards
from madformer_jax.evaluation.networks import classifier
from madformer_jax.models import madformer
from madformer_jax.modes import reference as reference_mode
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import generation
from tests import tiny

N = 20


def config_of(data):
    c = tiny.get_config("plain")
    c.data.source, c.data.path, c.data.test_share = "folder", str(data), 0.5
    c.evaluate.n = N
    c.sample.steps = 1
    return c


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with forty images of two classes."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(40):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 128 + 127 * (i % 2), (32, 32), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data):
    """A workdir with two checkpoints of an untrained model, a classifier and a reference."""
    folder = tmp_path_factory.mktemp("run")
    c = config_of(data)
    params = classifier.init(jax.random.key(0), classes=2, channels=1)
    classifier.save(folder / "classifier.npz", classifier.Classifier(params, 2, 1, accuracy=0.5, held_out=8))
    reference_mode.run(c, str(folder))
    checkpoint.write_config(c, str(folder))
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    target = generation.abstract_params(madformer.build(c), mesh)
    with checkpoint.Checkpoints(str(folder), keep=2) as checkpoints:
        for step in (1, 2):
            tree = jax.tree.map(
                lambda x, s=step: jax.device_put(np.full(x.shape, 0.01 * s, x.dtype), x.sharding), target
            )
            checkpoints.save(step, {"ema": tree, "params": tree}, None, {"step": step})
    return folder


@pytest.fixture
def fresh(workdir, tmp_path, data, monkeypatch):
    """A config, and an empty folder for evaluations in the workdir."""
    monkeypatch.setattr(shards, "MAX_BATCH", 8)
    (workdir / "evaluations").mkdir(exist_ok=True)
    (workdir / "evaluations").rename(tmp_path / "old")
    return config_of(data)


def data_images(data, split):
    image_set = images.from_source(config_of(data), split, shuffled=False)
    return image_set.read(np.arange(image_set.n)).images
