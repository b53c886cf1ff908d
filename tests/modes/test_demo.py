"""The page to draw with: two sides at equal cost, and the page itself over HTTP."""

import numpy as np
import pytest

import madformer_jax
from madformer_jax import main
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import demo
from madformer_jax.runtime import checkpoint
from tests import tiny
from tests.small import random_params


def saved(workdir, names):
    c = tiny.get_config("plain")
    c.model.classes, c.model.blocks = len(names), 4
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(6, {"ema": random_params(madformer.build(c))}, None, {"step": 6, "data": {"names": names}})
    checkpoint.write_config(c, str(workdir))
    return madformer_jax.load(str(workdir))


@pytest.fixture
def model(tmp_path, one_device):
    return saved(tmp_path / "one", ["cat", "dog", "cow"])


def test_the_side_that_has_cost_less_goes_on(model):
    settings = [{"labels": ["dog", "cow"], "steps": steps, "seed": 4} for steps in (1, 3)]
    first, *shown = demo.race([model, model], settings, "block")
    assert [one.frame for one in first] == [None, None]
    costs = [[one.passes for one in sides] for sides in shown]
    assert costs[-1] == [1.75, 3.75] and len(shown) == 8  # four blocks each, of which three extend the cache
    for before, after in zip([[0.0, 0.0], *costs], costs):
        moved = int(before[1] != after[1])
        assert before[moved] <= before[1 - moved] or before[1 - moved] == (1.75, 3.75)[1 - moved]
    for one, given in zip(shown[-1], settings):
        assert np.abs(one.frame.images.astype(int) - model.sample(**given)).max() <= 1
    with pytest.raises(ConfigError, match="'bird' is neither"):
        next(demo.race([model], [{"labels": ["bird"]}], "block"))


def test_the_page_draws_on_both_sides(model):
    pytest.importorskip("gradio")
    from gradio_client import Client

    served = demo.serve(demo.page({"a": model, "b": model}, 2), "127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match=r"config.demo.port=\d+: .* choose another"):
            demo.serve(demo.page({"a": model}, 2), "127.0.0.1", served.server_port)
        client = Client(served.local_url, verbose=False)
        job = client.submit("dog", 3, "block", "a", "ddim", 1, 1.0, "b", "ddim", 2, 1.0, api_name="/draw")
        job.result(timeout=120)
        told = [output[2:] for output in job.outputs()]
        assert told[0] == ("compiling ...", "compiling ...") and len(told) == 9
        assert "block **4** of 4, step 1; an image so far: **1.75** full-model passes" in told[-1][0]
        assert "**2.75** full-model passes" in told[-1][1]
        with pytest.raises(Exception, match="config.seed=8589934592"):
            client.predict("dog", 2**33, "block", "a", "ddim", 1, 1.0, "b", "ddim", 2, 1.0, api_name="/draw")
    finally:
        served.close(verbose=False)


def test_another_model_must_draw_the_same(model, tmp_path, capsys):
    pytest.importorskip("gradio")
    saved(tmp_path / "other", ["red", "blue"])
    args = ["main", "--mode=demo", f"--workdir={tmp_path / 'one'}", f"--config.demo.other={tmp_path / 'other'}"]
    assert main.main(args) == 2
    assert "config.demo.other: it draws other classes" in capsys.readouterr().err
