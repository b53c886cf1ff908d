"""--mode=probe on a tiny model."""

import json

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import probe
from madformer_jax.runtime import checkpoint
from tests import tiny
from tests.small import random_params


def test_the_page_has_two_plots_and_the_suggested_depth(tmp_path, one_device):
    c = tiny.get_config()
    c.model.depth, c.model.unet_attention = 2, (False,)
    c.probe.n, c.probe.batch, c.probe.steps = 3, 2, 2
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(6, {"ema": random_params(madformer.build(c))}, None, {"step": 6, "data": {"names": []}})
    checkpoint.write_config(c, str(tmp_path))
    done = probe.run(c, str(tmp_path))
    assert done["suggested_depth"] == 1
    with open(done["page"]) as file:
        page = file.read()
    assert page.count("<svg") == 2 and "Suggested D: 1 of N = 2 layers" in page and "<script" not in page
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert result["n"] == 4 and result["step"] == 6 and sorted(result["reuse_loss"]) == ["1", "2"]
    losses = result["loss_by_block"]
    assert {len(x) for x in losses.values()} == {c.model.blocks}
    true, estimated = losses["true"], losses["estimated"]
    assert true[0] == pytest.approx(estimated[0]) and true[1] != estimated[1]  # no block precedes the first
    c.model.ar_condition = False
    with pytest.raises(ConfigError, match="there is no cut to suggest"):
        probe.run(c, str(tmp_path))
