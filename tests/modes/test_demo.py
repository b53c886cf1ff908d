"""Tests of the demo: two sides at equal cost, and the page over HTTP."""

import itertools
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import madformer_jax
from madformer_jax.cli import command_line
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import demo
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import prompts, trained_model
from tests import tiny
from tests.small import random_params


def saved(workdir, names, words=False):
    """Saves and loads a model of named classes or of captions."""
    c = tiny.get_config("plain")
    c.model.classes, c.model.blocks = len(names), 4
    if words:
        c.model.classes, c.text.tokenizer, c.text.length, c.sample.n = 0, "drawings", 77, 2
        c.text.vocabulary = text.open_tokenizer("drawings").vocabulary
    meta = {"step": 6, "data": {"names": names}, **text.tokenizer_identity(c)}
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(6, {"ema": random_params(madformer.build(c))}, None, meta)
    checkpoint.write_config(c, str(workdir))
    return madformer_jax.load(str(workdir))


@pytest.fixture
def model(tmp_path, one_device):
    return saved(tmp_path / "one", ["cat", "dog", "cow"])


def test_cheaper_side_draws_first(model):
    settings = [{"labels": ["dog", "cow"], "steps": steps, "seed": 4} for steps in (1, 3)]
    first, *states = demo.stream_side_by_side([model, model], settings, "block")
    assert [(side.frame, side.compiling) for side in first] == [(None, True)] * 2
    costs = [[side.passes for side in sides] for sides in states]
    assert costs[-1] == [1.75, 3.75] and len(states) == 8  # four blocks each; three extend the cache
    for before, after in zip([[0.0, 0.0], *costs], costs):
        moved = int(before[1] != after[1])
        assert before[moved] <= before[1 - moved] or before[1 - moved] == (1.75, 3.75)[1 - moved]
    for side, side_settings in zip(states[-1], settings):
        assert np.abs(side.frame.images.astype(int) - model.sample(**side_settings)).max() <= 1
    # Other seeds, labels and steps compile nothing; another kind of guidance does.
    for guidance, compiling in ((1.0, False), (2.0, True)):
        other = {"labels": ["cat", "cat"], "steps": 2, "seed": 5, "guidance": guidance}
        assert [next(demo.stream_side_by_side([model], [other], "block"))[0].compiling] == [compiling]
    with pytest.raises(ConfigError, match="'bird' is neither"):
        next(demo.stream_side_by_side([model], [{"labels": ["bird"]}], "block"))


def test_the_page_draws_on_both_sides(model):
    pytest.importorskip("gradio")
    from gradio_client import Client

    model.config.sample.steps, model.config.sample.guidance = 250, 9.0
    page = demo.build_page({"a": model, "b": model}, 2)
    sliders = [x for x in page.blocks.values() if x.get_block_name() == "slider"]
    assert [x.preprocess(x.value) for x in sliders] == [50, 9.0, 250, 9.0]
    served = demo.serve(page, "127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match=r"config.demo.port=\d+: .* choose another"):
            demo.serve(demo.build_page({"a": model}, 2), "127.0.0.1", served.server_port)
        client = Client(served.local_url, verbose=False)
        job = client.submit("dog", 3, "block", "a", "ddim", 1, 1.0, "b", "ddim", 2, 1.0, api_name="/draw")
        job.result(timeout=120)
        captions = [output[2:] for output in job.outputs()]
        assert captions[0] == (demo._cost_caption(model, demo.PaneState(None, 0.0, True)),) * 2 and len(captions) == 9
        assert "block **4** of 4, step 1; an image so far: **1.75** full-model passes" in captions[-1][0]
        assert "**2.75** full-model passes" in captions[-1][1]
        sides = "a", "ddim", 1, 1.0, "b", "ddim", 3, 1.0, "constant", 0, "1,1,3,1", 0
        job = client.submit("cat", 4, "block", *sides, api_name="/draw")
        job.result(timeout=120)
        assert job.outputs()[0][2:] == ("starting ...", "starting ...")
        assert "**2.25** full-model passes" in job.outputs()[-1][3]  # six steps in four blocks, and the cache
        with pytest.raises(Exception, match="config.seed=8589934592"):
            client.predict("dog", 2**33, "block", "a", "ddim", 1, 1.0, "b", "ddim", 2, 1.0, api_name="/draw")
    finally:
        served.close(verbose=False)


SIDES = ("a", "ddim", 1, 1.0, "a", "ddim", 2, 1.0)


@pytest.fixture
def client(monkeypatch, request, tmp_path, one_device):
    """A client of the page of a model."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    names, words = request.param
    served = demo.serve(demo.build_page({"a": saved(tmp_path / "run", names, words)}, 2), "127.0.0.1", 0)
    yield Client(served.local_url, verbose=False)
    served.close(verbose=False)


def drawn(client, *fields):
    job = client.submit(*fields, *SIDES, api_name="/draw")
    job.result(timeout=120)
    return job.outputs()[-1]


def pixels(output):
    with Image.open(output[1]) as image:
        return np.asarray(image)


@pytest.mark.parametrize("client", [(["2", "0", "all", "1", "0", "x, y"], False)], indirect=True)
def test_entries_of_the_class_list_draw_their_class(client, monkeypatch, tmp_path):
    calls = []
    stream = trained_model.Model.stream
    monkeypatch.setattr(
        trained_model.Model, "stream", lambda self, **settings: calls.append(settings) or stream(self, **settings)
    )
    (dropdown,) = [x for x in client.config["components"] if x["props"].get("label") == "class"]
    entries = [entry[1] for entry in dropdown["props"]["choices"]]
    assert entries == ["all", "2", "0 (#1)", "all (#2)", "1", "0 (#4)", "x, y"]
    images = []
    for k, entry in enumerate(entries[1:]):
        images.append(pixels(drawn(client, entry, 3, "block")))
        assert calls[-1]["labels"] == [k]
    assert all((a != b).any() for a, b in itertools.combinations(images, 2))


@pytest.mark.parametrize("client", [((), True)], indirect=True)
def test_prompt_box_reads_no_file_and_opens_no_data(client, tmp_path, monkeypatch):
    """Paths and the directives of the command line are literal prompts."""
    read = []
    tokenize = prompts.tokenize
    monkeypatch.setattr(prompts, "tokenize", lambda c: read.append(prompts.load(c)) or tokenize(c))
    (tmp_path / "s.txt").write_text("a secret planet")
    for prompt in (f"{tmp_path}/s.txt", f"{tmp_path}/m.txt", "data:test", "data:nothing", '["a", "b"]', "a; b.txt"):
        output = drawn(client, prompt, 3, "block")
        assert "block **4** of 4" in output[2]
        assert all(x == [prompt] * 2 for x in read)
        read.clear()
    drawn(client, "a red planet\n\n a; b ", 3, "block")
    assert read[-1] == ["a red planet", "a; b"]
    for text_box, message in (("", "holds no prompt"), ("a\nb\nc", "prompts: there are 3 of them for n=2 images")):
        with pytest.raises(Exception, match=message):
            drawn(client, text_box, 3, "block")
    import httpx  # comes with gradio, which the fixture requires

    answers = [httpx.get(f"{client.src}gradio_api/file={tmp_path}/{name}.txt", trust_env=False) for name in "sm"]
    assert [answer.status_code for answer in answers] == [403, 403] and "secret" not in answers[0].text


@pytest.mark.parametrize("client", [(["cat", "dog"], False)], indirect=True)
def test_empty_seed_is_chosen_and_shown(client):
    first, second = (drawn(client, "dog", None, "block") for _ in range(2))
    seed, other = (int(re.match(r"seed \*\*(\d+)\*\*; block", output[2])[1]) for output in (first, second))
    assert seed != other and first[3].startswith(f"seed **{seed}**")
    again = drawn(client, "dog", seed, "block")
    np.testing.assert_array_equal(pixels(again), pixels(first))
    assert again[2].startswith("block")


def test_page_is_served_behind_proxies(tmp_path):
    """Runs in a process of its own, because gradio makes an HTTP client when it is imported. Each client takes its proxy."""
    pytest.importorskip("gradio")
    code = (
        "import urllib.request\n"
        "from madformer_jax.modes import demo\n"
        "gr = demo._import_gradio()\n"
        "with gr.Blocks() as blocks: gr.Markdown('the page')\n"
        "served = demo.serve(blocks, '127.0.0.1', 0)\n"
        "open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open\n"
        "print('the page' in open_url(served.local_url).read().decode())\n"
        "import os; os._exit(0)\n"
    )
    http, socks = "http://127.0.0.1:9", "socks5h://127.0.0.1:9"
    proxies = {"http_proxy": http, "HTTPS_PROXY": http, "ALL_PROXY": socks, "all_proxy": socks}
    environment = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"} | proxies
    done = subprocess.run([sys.executable, "-uc", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "True" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("192.0.2.7", 0, "config.demo.host='192.0.2.7' is not an address of this machine"),
        ("nowhere.invalid", 7860, "config.demo.host='nowhere.invalid' is not an address of this machine"),
        ("http://localhost", 0, "config.demo.host='http://localhost' is not an address"),
        ("a..b", 0, "config.demo.host='a..b' is not an address"),
    ],
)
def test_address_of_another_machine_is_refused_at_once(host, port, words):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        demo._check_address(host, port)
    assert "\n" not in str(error.value) and time.monotonic() - began < 10


def test_other_model_must_have_the_same_classes(model, tmp_path, capsys):
    pytest.importorskip("gradio")
    saved(tmp_path / "other", ["red", "blue"])
    args = ["main", "--mode=demo", f"--workdir={tmp_path / 'one'}", f"--config.demo.other={tmp_path / 'other'}"]
    assert command_line.main([*args, "--config.demo.port=0"]) == 2  # a port that no other test uses
    assert "config.demo.other has other classes" in capsys.readouterr().err
