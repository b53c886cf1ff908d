"""The gallery page: its script shows exactly the recorded frames."""

import base64
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import madformer_jax
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import sampling_grid
from madformer_jax.models import madformer
from madformer_jax.modes import gallery as mode
from madformer_jax.publishing import gallery_page
from madformer_jax.publishing.gallery_page import Frame, Recording
from madformer_jax.runtime import checkpoint
from tests import tiny
from tests.small import random_params


def recording(name="4 steps", n=2, side=16, steps=3):
    """Returns a recording of four blocks, each of which changes at every step."""
    rng = np.random.default_rng(0)
    images, frames = np.full((4 * steps, n, side, side, 3), 128, np.uint8), []
    for i in range(4 * steps):
        block, half = i // steps, side // 2
        top, left = block // 2 * half, block % 2 * half
        images[i:, :, top : top + half, left : left + half] = rng.integers(0, 256, (n, half, half, 3))
        frames.append(Frame(block + 1, i % steps + 1, (i + 1) / 4, i / 10))
    return Recording(name, frames, images)


def shown_frames(page, setting, number):
    """Yields the frames of an image as the script of the page draws them."""
    content = json.loads(re.search(r'id="content">(.*?)</script>', page, re.DOTALL)[1])
    data = content["recordings"][setting]
    sheet = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(data["sheets"][number].partition(",")[2]))).convert("RGB")
    )
    canvas = np.zeros((*data["size"], 3), np.uint8)
    for top, left, height, width, y, x in data["boxes"]:
        canvas[top : top + height, left : left + width] = sheet[y : y + height, x : x + width]
        yield canvas.copy()


def test_the_page_shows_every_recorded_frame():
    recordings = [recording(), recording("9 steps", steps=9)]
    page = gallery_page.render("Title", "<about>", ["a", "</script>b"], recordings)
    assert page.count("</script>") == 2 and "&lt;about&gt;" in page  # a caption cannot close the script
    for setting, original in enumerate(recordings):
        for number in range(2):
            np.testing.assert_array_equal(list(shown_frames(page, setting, number)), original.images[:, number])


def test_a_page_is_compressed_to_its_limit_or_refused():
    many = [recording(n=3, side=64, steps=20)]
    whole = gallery_page.render("", "", ["a"] * 3, many)
    small = gallery_page.render("", "", ["a"] * 3, many, max_bytes=len(whole) // 3)
    assert len(small) <= len(whole) // 3
    *_, last = shown_frames(small, 0, 0)
    assert np.abs(last.astype(int) - many[0].images[-1, 0]).mean() < 60  # random pixels, compressed hard
    with pytest.raises(ConfigError, match="do not fit a page of 0.01 MB"):
        gallery_page.render("", "", ["a"] * 3, many, max_bytes=10_000)


def test_guidance_without_label_dropout_logs_a_warning(caplog):
    c = tiny.get_config()
    c.train.label_dropout, c.sample.guidance = 0.0, 1.0
    c.evaluate.grid = "guidance=1,2;steps=1,3"
    sampling_grid.log_warnings(c, sampling_grid.expand_configs(c))
    assert [line[:31] for line in caplog.messages] == ["config.sample.guidance=2 with c"]


def test_the_gallery_mode_records_a_model(tmp_path, one_device):
    c = tiny.get_config("plain")
    for grid, shown in (("weights=ema,raw", "weights"), ("ema=0,0.05", "weights"), ("label_sampling=random", "labels")):
        c.gallery.grid, c.model.classes = grid, 3
        with pytest.raises(ConfigError, match=f"one page shows one set of {shown}"):
            mode.run(c, str(tmp_path))
    c.model.classes, c.gallery.n, c.gallery.grid = 3, 2, "steps=1,3"
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(
            6, {"ema": random_params(madformer.build(c))}, None, {"step": 6, "data": {"names": ["cat", "dog", "cow"]}}
        )
    checkpoint.write_config(c, str(tmp_path))
    content = pathlib.Path(mode.run(c, str(tmp_path))["page"]).read_text()
    assert '"captions": ["cat", "dog"]' in content and "steps 1" in content and "steps 3" in content
    images = madformer_jax.load(str(tmp_path)).sample(labels=["cat", "dog"], steps=3)
    for number in range(2):
        *_, last = shown_frames(content, 1, number)
        np.testing.assert_array_equal(last, np.repeat(images[number], 3, axis=-1))
