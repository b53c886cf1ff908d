"""Tests of opening a trained model."""

import jax
import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.models import ema, madformer
from madformer_jax.modes import export
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import opening
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.weights import state_dicts
from tests import tiny
from tests.small import random_params


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_step_of_a_run_and_an_export_without_checkpoints_open(tmp_path, one_device):
    c = tiny.get_config("plain")
    params = random_params(madformer.build(c))
    with checkpoint.Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step in (4, 6):
            ema = jax.tree.map(lambda x, step=step: step * x, params)
            checkpoints.save(step, {"ema": ema}, None, {"step": step, "data": {"names": ["cat", "dog"]}})
    newest = TrainedModel.open(c, str(tmp_path))
    assert (newest.step, newest.newest_step, newest.class_names) == (6, 6, ["cat", "dog"])
    older = TrainedModel.open(c, str(tmp_path), step=4, check_memory_for="sampling")
    assert (older.step, older.newest_step) == (4, 6)
    assert_same(older.params, jax.tree.map(lambda x: 4 * x, params))
    assert older.load_codec_params() == {}  # Pixels have no weights.
    export = tmp_path / "export"
    export.mkdir()
    tensors = state_dicts.flatten(jax.device_get(params))
    state_dicts.write_state_dict(f"{export}/model.safetensors", tensors, {"step": 4, "names": ["cat"]})
    exported = TrainedModel.open(c, str(export))
    assert (exported.step, exported.newest_step, exported.class_names) == (4, None, ["cat"])
    assert_same(exported.params, params)
    with pytest.raises(ConfigError, match="nothing"):
        TrainedModel.open(c, str(tmp_path / "nothing"))


def test_a_guide_of_another_kind_is_refused(tmp_path, one_device):
    c, guide = tiny.get_config("plain"), tiny.get_config("plain")
    guide.codec.patch, guide.model.classes = 8, 2
    checkpoint.write_config(guide, str(tmp_path))
    c.sample.guide = str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"cannot guide .*codec\.patch is 8 in the guide and 4 in this model; .*model\.classes is 2"
    ) as error:
        opening.open_guide(c)
    assert "\n" not in str(error.value)
    c.sample.guide = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.sample\.guide=.*config\.json does not exist"):
        opening.open_guide(c)


def test_snapshots_combine_to_the_average_of_a_width_that_an_export_keeps(tmp_path, one_device, caplog):
    """The parameters of step t are t times an array, so that each average is its profile's mean step."""
    c = tiny.get_config("plain")
    c.train.ema_snapshots, c.sample.ema = 20, 0.15
    params, steps = random_params(madformer.build(c)), range(20, 101, 20)
    with checkpoint.Checkpoints(str(tmp_path), keep_every=[20]) as checkpoints:
        for step in steps:
            trees = {
                name: jax.tree.map(lambda x, w=width, t=step: np.float32(mean_step(w, t)) * x, params)
                for name, width in ema.PROFILES.items()
            }
            checkpoints.save(step, {"ema": params, "power_ema": trees}, None, {"step": step})
    checkpoint.write_config(c, str(tmp_path))
    expected = jax.tree.map(lambda x: mean_step(0.15, 100) * x, params)
    with caplog.at_level("INFO", logger="absl"):
        trained = TrainedModel.open(c, str(tmp_path))
    assert trained.step == 100 and "5 snapshots up to step 100" in caplog.text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01), trained.params, expected)
    assert trained.protocol(c) == {"ema": 0.15}
    assert [record.levelname for record in caplog.records if "snapshots up to" in record.message] == ["INFO"]
    caplog.clear()
    TrainedModel.open(c, str(tmp_path), step=20)  # one snapshot gives a profile with an error of 25 %
    assert [record.levelname for record in caplog.records if "1 snapshots up to step 20" in record.message] == [
        "WARNING"
    ]
    exported = export.run(c, str(tmp_path))["export"]
    c.sample.ema = 0.0
    assert_same(TrainedModel.open(c, exported).params, trained.params)
    c.sample.ema = 0.05
    with pytest.raises(ConfigError, match="holds no power_ema, only ema, meta"):
        TrainedModel.open(c, exported)


def mean_step(width, t):
    """The mean of the profile of relative width `width` at step t."""
    gamma = ema.exponent(width)
    return (gamma + 1) / (gamma + 2) * t
