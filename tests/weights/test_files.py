"""Tests of checkpoint files: no code in them runs, values are exact, errors take one line."""

import argparse
import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.weights import state_dicts

FORMATS = ["m.npz", "m.safetensors", "m.pt", "m.bin"]


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 2, 5)).astype(np.float32),
        "a.turned": rng.standard_normal((4, 3)).astype(np.float32).T,  # not contiguous
        "b.half": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "b.count": np.array(7, np.int64),
    }


def path_of(tmp_path, name):
    if not name.endswith(("npz", "safetensors")):
        pytest.importorskip("torch")
    return tmp_path / name


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize("name", FORMATS)
def test_writing_and_reading_keeps_every_bit(tmp_path, tensors, name):
    path = path_of(tmp_path, name)
    state_dicts.write_state_dict(path, tensors, {"depth": 4, "clear_cond": False, "sizes": [1, 2]})
    content = state_dicts.read_state_dict(path)
    assert content.args == {"depth": 4, "clear_cond": False, "sizes": [1, 2]}
    assert content.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert content.tensors[key].dtype == tensor.dtype
        assert content.tensors[key].shape == tensor.shape
        assert content.tensors[key].tobytes() == tensor.tobytes()
    assert os.listdir(tmp_path) == [name]  # no temporary file left


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_file_is_one_line_that_names_it(tmp_path, tensors, name):
    path = path_of(tmp_path, name)
    state_dicts.write_state_dict(path, tensors)
    size = path.stat().st_size
    for length in (0, 60, size // 2, size - 40):
        with path.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(ConfigError) as error:
            state_dicts.read_state_dict(path)
        assert_one_line(error, path, "truncated")
        state_dicts.write_state_dict(path, tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_file_of_another_kind_is_one_line_that_names_it(tmp_path, name):
    path = path_of(tmp_path, name)
    path.write_text("<html>404 not found</html>\n" * 20)
    with pytest.raises(ConfigError) as error:
        state_dicts.read_state_dict(path)
    assert_one_line(error, path)


def test_an_npz_file_that_is_an_array_or_damaged_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "m.npz"
    np.save(tmp_path / "m.npy", np.zeros(3))
    np.savez_compressed(path, a=np.arange(99.0))
    array, archive = (tmp_path / "m.npy").read_bytes(), path.read_bytes()
    damaged = [bytearray(archive) for _ in range(2)]
    damaged[0][archive.index(b"PK\1\2") + 10] ^= 0x77  # the compression method
    damaged[1][100] ^= 0x77  # the compressed data
    for content in (array, *damaged):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            state_dicts.read_state_dict(path)
        assert_one_line(error, path)


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        state_dicts.read_state_dict(tmp_path / "m.npz")
    for access in (state_dicts.read_state_dict, lambda path: state_dicts.write_state_dict(path, {})):
        with pytest.raises(ConfigError, match=r"must end in one of \.pt"):
            access(tmp_path / "m.ckpt")


def test_failed_write_leaves_the_old_file(tmp_path, tensors):
    path = tmp_path / "m.npz"
    state_dicts.write_state_dict(path, tensors)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        state_dicts.write_state_dict(path, tensors, {"not JSON": object()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.npz"]


def test_check_names_every_tensor_that_does_not_fit():
    expected = {"a": (2, 3), "b": (1,), "c": (4,), "d": ()}
    tensors = {"a": np.zeros((3, 2)), "c": np.zeros(4), "e": np.zeros(1), "f": np.zeros(1)}
    with pytest.raises(ConfigError) as error:
        state_dicts.check_tensors(expected, tensors, "m.pt")
    assert_one_line(error, "m.pt", "2 missing (b, d)", "2 extra (e, f)", "1 mis-shaped (a (3, 2) instead of (2, 3))")
    state_dicts.check_tensors({"a": (3, 2)}, {"a": np.zeros((3, 2))}, "m.pt")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [True, False], ids=["pickle", "zip"])
@pytest.mark.parametrize("inside", ["alone", "args"])
def test_malicious_pickle_does_not_run(tmp_path, legacy, inside):
    torch = pytest.importorskip("torch")
    path, marker = tmp_path / "m.pt", tmp_path / "owned"
    content = Evil(marker) if inside == "alone" else {"model": {"a": torch.zeros(2)}, "args": Evil(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError) as error:
        state_dicts.read_state_dict(path)
    assert_one_line(error, path, "mkdir")
    assert not marker.exists()


def test_plain_pickle_and_pickle_in_npz_do_not_run(tmp_path):
    pytest.importorskip("torch")
    marker = tmp_path / "owned"
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Evil(marker)))
    np.savez(tmp_path / "m.npz", a=np.array([Evil(marker)], dtype=object))
    for name in ("m.pt", "m.npz"):
        with pytest.raises(ConfigError) as error:
            state_dicts.read_state_dict(tmp_path / name)
        assert_one_line(error, tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [True, False], ids=["pickle", "zip"])
def test_release_checkpoint_gives_ema_model_and_args(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    path = tmp_path / "0001000.pt"
    content = {
        "model": {"a": torch.zeros(2)},
        "ema": {"a": torch.ones(2)},
        "opt": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
        },
        "args": argparse.Namespace(diff_depth=14, clear_cond=False),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(path) != legacy
    for weights, value, expected in (("", 1, "ema"), ("ema", 1, "ema"), ("model", 0, "model")):
        read = state_dicts.read_state_dict(path, weights)
        np.testing.assert_array_equal(read.tensors["a"], [value] * 2)
        assert (read.weights, read.args) == (expected, {"diff_depth": 14, "clear_cond": False})

    del content["ema"]
    torch.save(content, path)
    assert state_dicts.read_state_dict(path).weights == "model"
    with pytest.raises(ConfigError, match="no 'ema' weights, only 'model'"):
        state_dicts.read_state_dict(path, "ema")
    torch.save(content["model"], path)
    with pytest.raises(
        ConfigError, match="no 'ema' weights, only one set without a name: leave config.convert.weights"
    ):
        state_dicts.read_state_dict(path, "ema")


def test_checkpoint_without_a_state_dict(tmp_path):
    torch = pytest.importorskip("torch")
    float8 = torch.zeros(2).to(torch.float8_e4m3fn)
    for content in ([torch.zeros(2)], {"epoch": 3}, {}, {"a": float8}):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(ConfigError, match="no state_dict"):
            state_dicts.read_state_dict(tmp_path / "m.pt")
    torch.save({"model": {"a": torch.zeros(2)}, "args": [1]}, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="'args' is of type list"):
        state_dicts.read_state_dict(tmp_path / "m.pt")
    pytest.importorskip("safetensors.torch").save_file({"a": float8}, tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        state_dicts.read_state_dict(tmp_path / "m.safetensors")


def test_without_pytorch_the_error_says_what_to_do(tmp_path, tensors, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pt").write_bytes(b"")
    for access in (state_dicts.read_state_dict, lambda path: state_dicts.write_state_dict(path, tensors)):
        with pytest.raises(ConfigError) as error:
            access(tmp_path / "m.pt")
        assert_one_line(error, tmp_path / "m.pt", "pip install torch", ".safetensors")
