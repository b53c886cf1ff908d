"""Editing a picture: kept blocks are kept bit for bit, the others are drawn, wrong edits end in one line."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import madformer_jax
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.errors import ConfigError
from madformer_jax.modes import sample
from madformer_jax.sampling import codec, editing, generation
from tests import tiny
from tests.sampling.test_trained_model import saved

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 1), np.uint8)


def config(**changes):
    c = tiny.get_config("plain")
    c.model.blocks, c.model.block_order, c.model.depth = 4, "random", 2
    c.update_from_flattened_dict(changes)
    return c


def test_edits_keep_blocks_bit_for_bit_and_draw_the_others(tmp_path, one_device):
    c = config(**{"sample.n": 3})
    workdir = saved(c, tmp_path / "run", [])
    mask = np.zeros((32, 32), bool)
    mask[:16], mask[16:, 16:] = True, True  # keeps blocks 0, 1 and 3
    mask[3, 3] = False  # and block 0 not as a whole
    for name, pixels in (("picture", PICTURE[..., 0]), ("mask", np.uint8(255) * mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    c.sample.image, c.sample.keep = str(tmp_path / "picture.png"), str(tmp_path / "mask.png")
    free = sample._folder_name(c, {"step": 6})
    (shard,) = generation.read_shards(sample.run(c, workdir)["folder"])
    assert "_edit_" in free
    blocks = codec.to_blocks(shard.images, derive_sizes(config(**{"codec.patch": 1})))
    expected = codec.to_blocks(PICTURE[None], derive_sizes(config(**{"codec.patch": 1})))
    for place, is_kept in enumerate((False, True, False, True)):
        same = (blocks[:, place] == expected[:, place]).all(axis=(1, 2))
        assert same.all() if is_kept else not same.any()
    assert (blocks[0, 0] != blocks[1, 0]).any()  # many samples of one edit

    model = madformer_jax.load(workdir)
    np.testing.assert_array_equal(model.sample(3, image=PICTURE, mask=mask), shard.images)
    frames = list(model.stream(3, image=PICTURE, mask=[3, 1]))
    assert [frame.block for frame in frames] == [2, 3]
    assert np.abs(frames[-1].images.astype(int) - shard.images).max() <= 1
    cost, whole = model.cost(kept_count=2), model.cost()
    assert frames[-1].passes == cost.passes < whole.passes and cost.nfe == whole.nfe / 2
    two = model.sample(3, image=np.stack([PICTURE, 255 - PICTURE]), mask=mask)  # pictures in turn
    np.testing.assert_array_equal(two[[0, 2]], shard.images[[0, 2]])
    np.testing.assert_array_equal(two[1, :16, 16:], 255 - PICTURE[:16, 16:])
    with pytest.raises(ConfigError, match="there are 2 of them for n=1 images"):
        model.sample(1, image=np.stack([PICTURE] * 2), mask="0")


def test_a_model_of_fixed_order_keeps_the_beginning_of_its_order(tmp_path, monkeypatch):
    c = config(**{"model.block_order": "reverse"})
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(PICTURE[..., 0]).save(tmp_path / "picture.png")
    assert editing.read_edit(c, "~/picture.png", jnp.array([3])).kept_numbers.tolist() == [3]
    assert editing.read_edit(c, PICTURE, [2, 3]).kept_numbers.tolist() == [3, 2]
    with pytest.raises(ConfigError, match="'reverse' allows only the beginning of 3,2,1. Train with"):
        editing.read_edit(c, PICTURE, [0])


def test_masks_have_the_size_of_the_model_or_of_the_picture(tmp_path):
    c = config()
    large = np.zeros((64, 96), np.uint8)
    large[:, :48] = 255  # the left half, also of the square that is cropped
    assert editing.read_edit(c, np.zeros((64, 96, 1), np.uint8), large).kept_numbers.tolist() == [0, 2]
    with pytest.raises(ConfigError, match="the mask has 96 x 64 pixels: it must have 32 x 32, as the picture"):
        editing.read_edit(c, PICTURE, large)


@pytest.mark.parametrize(
    ("changes", "image", "mask", "message"),
    [
        ({}, PICTURE, "0,1,2,3", "keeps all blocks, and none is left to draw. The image has 2 x 2 blocks"),
        ({}, PICTURE, np.zeros((32, 32), bool), "keeps no block: a block is kept if all of it is white"),
        ({}, PICTURE, [], "keeps no block"),
        ({}, PICTURE, np.array(3), "must be a file or an array"),
        ({}, PICTURE, "0,7", "'7' is not a block"),
        ({}, PICTURE, None, "image needs mask: an edit"),
        ({}, None, "0", "mask needs image: an edit"),
        ({}, "no/such.png", "0", "image=no/such.png cannot be read"),
        ({}, PICTURE, "no/mask.png", "mask=no/mask.png cannot be read"),
        ({}, __file__, "0", "test_editing.py cannot be decoded"),
        ({}, PICTURE, __file__, "test_editing.py cannot be decoded"),
        ({}, PICTURE / 255, "0", "the type float64: it must be uint8"),
        ({}, PICTURE, np.zeros((32, 32), np.float32), "the type float32: it must be bool or uint8"),
        ({}, 7, "0", "image=7 must be a file or an array"),
        ({"model.clean_stream": False}, PICTURE, "0", "needs a model with config.model.clean_stream=True"),
        ({"model.blocks": 1}, PICTURE, "0", "config.model.blocks=1 has no block to keep"),
        ({"codec.name": "external"}, PICTURE, "0", "needs a codec that encodes images"),
    ],
)  # fmt: skip
def test_wrong_edits_end_in_one_line(changes, image, mask, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        editing.read_edit(config(**changes), image, mask)
    assert "\n" not in str(error.value)
    assert "config.sample" not in str(error.value).replace(message, "")


def test_errors_name_the_fields_if_these_name_the_picture():
    with pytest.raises(ConfigError, match=r"config\.sample\.image needs config\.sample\.keep"):
        editing.read_edit(config(**{"sample.image": "a.png"}))
    with pytest.raises(ConfigError, match=r"config\.sample\.image=a\.png cannot be read"):
        editing.read_edit(config(**{"sample.image": "a.png", "sample.keep": "0"}))
