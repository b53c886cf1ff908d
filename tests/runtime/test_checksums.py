import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.weights import state_dicts


def test_one_flipped_byte_in_converted_weights_is_noticed(tmp_path):
    """In any file but Orbax's note of its commit; and its file is named."""
    params = {"conv": {"kernel": np.random.default_rng(0).standard_normal((64, 32), np.float32)}}
    state_dicts.save_params(tmp_path / "vae", params)
    state_dicts.save_params(tmp_path / "vae", params)  # over what is there
    paths = [p for p in (tmp_path / "vae").rglob("*") if p.is_file()]
    assert len(paths) > 8
    for path in paths:
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            np.testing.assert_array_equal(
                state_dicts.load_params(tmp_path / "vae")["conv"]["kernel"], params["conv"]["kernel"]
            )
        else:
            with pytest.raises(ConfigError, match=r"vae is damaged: vae/params/.*make it again with --mode=convert.$"):
                state_dicts.load_params(tmp_path / "vae")
        path.write_bytes(content)
