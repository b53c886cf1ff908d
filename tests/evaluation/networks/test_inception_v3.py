"""Inception-v3 against torch-fidelity's."""

import zlib

import jax
import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import inception_v3, inception_weights
from madformer_jax.weights import state_dicts


@pytest.fixture(scope="module")
def state(reference):
    """Random weights that the reference arrays were computed with."""
    tensors = {}
    for name, shape in reference("inception_fid_state_dict.json").items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.zeros((), np.int64)
            continue
        x = 0.5 + rng.random(shape) if name.endswith("running_var") else rng.standard_normal(shape)
        if len(shape) > 1:
            x *= np.sqrt(2.0 / np.prod(shape[1:]))
        elif not name.endswith("running_var"):
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        tensors[name] = x.astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def params(state):
    return inception_weights.from_torch(state)


def test_every_feature_equals_torch_fidelity(reference, params):
    arrays = reference("inception_fid.npz")
    features = jax.jit(inception_v3.features)(params, arrays["images_uint8_nchw"].transpose(0, 2, 3, 1))
    for name, value in features._asdict().items():
        expected = arrays[f"feature_{name.removeprefix('f')}"]
        assert value.shape == expected.shape
        assert np.linalg.norm(value - expected) / np.linalg.norm(expected) < 1e-4, name


def test_resize_has_no_half_pixel_centers():
    ramp = np.arange(4, dtype=np.float32)[None, :, None, None] + np.zeros((1, 4, 2, 1), np.float32)
    resized = inception_v3.resize(ramp, 8)
    np.testing.assert_array_equal(resized[0, :, 0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_array_equal(inception_v3.resize(ramp[:, :2], 2), ramp[:, :2])


def test_names_and_shapes_and_round_trip(reference, state, params):
    expected = {name: tuple(shape) for name, shape in reference("inception_fid_state_dict.json").items()}
    assert inception_weights.shapes() == expected
    back = inception_weights.to_torch(params)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_published_file_without_batch_counts_is_loaded(tmp_path, state, params):
    published = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
    state_dicts.write_state_dict(tmp_path / "inception.safetensors", published)
    loaded = inception_weights.load(str(tmp_path / "inception.safetensors"))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
    inception_weights.save(str(tmp_path / "orbax"), str(tmp_path / "inception.safetensors"))
    assert jax.tree.all(jax.tree.map(np.array_equal, inception_weights.load(str(tmp_path / "orbax")), params))


def test_wrong_tensors_are_all_named(tmp_path, state):
    wrong = {name: x for name, x in state.items() if name != "Mixed_5c.branch1x1.bn.running_mean"}
    wrong["fc.weight"] = wrong["fc.weight"][:1000]
    wrong["AuxLogits.fc.bias"] = np.zeros(3, np.float32)
    state_dicts.write_state_dict(tmp_path / "torchvision.npz", wrong)
    with pytest.raises(ConfigError) as error:
        inception_weights.save(str(tmp_path / "orbax"), str(tmp_path / "torchvision.npz"))
    for word in ("torchvision.npz", "Mixed_5c.branch1x1.bn.running_mean", "fc.weight", "AuxLogits.fc.bias"):
        assert word in str(error.value)
    assert not (tmp_path / "orbax").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        inception_weights.load(str(tmp_path / "empty"))
