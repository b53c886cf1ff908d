"""Tests that the examples in docs/extending.md work as they are written there: one new file and one line each."""

import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import choices
from madformer_jax.data import pipeline, sources
from madformer_jax.diffusion import schedule, solvers
from madformer_jax.evaluation.networks import registry
from madformer_jax.ops.attention.base import QKV
from madformer_jax.ops.attention.xla_blocks import XlaBlocks
from tests import tiny
from tests.diffusion.test_solvers import X_T, gaussian_denoiser, gaussian_image, run

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = r"`(madformer_jax/\S+)\.py`:\n\n```python\n(.*?)```\n\n```diff\n--- (\S+)\n (.*?)\n\+(.*?)\n```\n"
EXAMPLES = re.findall(EXAMPLE, (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


def apply(example, folder, monkeypatch):
    """Adds the file and the line of an example, and returns its class."""
    path, code, changed, before, line = example
    package = importlib.import_module(path.rpartition("/")[0].replace("/", "."))
    (folder / f"{path.rpartition('/')[2]}.py").write_text(code)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    content = (ROOT / changed).read_text()
    assert content.count(f"\n{before}\n") == 1 and code.count("\n") <= 30
    names = {}
    exec(content.replace(f"\n{before}\n", f"\n{before}\n{line}\n"), names)
    groups = ("NOISE_PATHS", "SOLVERS", "ATTENTION", "NETWORKS", "SOURCES")
    ((group, name),) = ((x, name) for x in groups for name in names[x].keys() - getattr(choices, x).keys())
    monkeypatch.setitem(getattr(choices, group), name, names[group][name])
    return pkgutil.resolve_name(f"{package.__name__}.{names[group][name]}")


@pytest.fixture
def added(request, tmp_path, monkeypatch):
    (example,) = (x for x in EXAMPLES if x[0].endswith(f"/{request.param}"))
    return apply(example, tmp_path, monkeypatch)


def test_each_kind_has_an_example():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("added", ["midpoint"], indirect=True)
@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_the_solver_has_order_two(added, path):
    path, errors = schedule.make(path), []
    for steps in (10, 40):
        t = path.solver_timesteps("trailing", steps)
        x = run(solvers.make("midpoint"), t, path, X_T, gaussian_denoiser)
        errors.append(np.linalg.norm(x - gaussian_image(path, t[0])))
    assert errors[1] < errors[0] / 4**1.7


@pytest.mark.parametrize("added", ["trig"], indirect=True)
def test_solvers_integrate_the_path(added):
    path = schedule.make("trig")
    x = run(solvers.make("heun"), path.solver_timesteps("trailing", 40), path, X_T, gaussian_denoiser)
    np.testing.assert_allclose(x, gaussian_image(path, 999), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("added", ["float32"], indirect=True)
def test_the_attention_rounds_only_its_result(added):
    rng = np.random.default_rng(0)
    stream = QKV(*(jnp.asarray(rng.normal(size=(1, 2, 3, 2, 4)), jnp.bfloat16) for _ in range(3)))

    @jax.jit
    def attend(stream):
        exact = QKV(*(x.astype(jnp.float32) for x in stream))
        return [x.block_attention([y], y.kv, None)[0] for x, y in ((added(), stream), (XlaBlocks(), exact))]

    out, exact = attend(stream)
    assert out.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize("added", ["brightness"], indirect=True)
def test_the_network_extracts_features(added):
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 3), dtype=np.uint8)
    features = registry.make_extractor(added.open(""))(images).features
    np.testing.assert_allclose(features[:, 0], images[:, :2, :2].mean((1, 2, 3)), rtol=1e-5)
    assert features.shape == (3, added.feature_dim)


@pytest.mark.parametrize("added", ["named_arrays"], indirect=True)
def test_the_source_is_read_in_training(added, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "arrays", added)
    for i, name in enumerate(("dog_1", "cat_7", "wild_cat_1")):
        np.save(tmp_path / f"{name}.npy", np.full((8 + i, 8, 1), i, np.uint8))
    c = tiny.get_config("plain")
    c.data.source, c.data.path, c.data.image_size, c.data.test_share = "arrays", str(tmp_path), 8, 0.0
    source = sources.open_source(c)
    assert source.names == ("cat", "dog", "wild_cat") and source.classes == 3
    assert source.captions(np.arange(2)) == ["", ""]
    batch = next(pipeline.train_iterator(c, batch=3))
    assert {(int(label), int(image.max())) for label, image in zip(batch["label"], batch["image"], strict=True)} == {
        (1, 0), (0, 1), (2, 2),
    }  # fmt: skip
