import jax
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.ops import rope
from madformer_jax.sampling import codec


@pytest.mark.parametrize(("count", "grid", "side"), [(4, (2, 2), (4, 4)), (8, (2, 4), (4, 2))])  # Table 2 has L = 8
def test_blocks_and_positions_are_in_raster_order(tiny_config, count, grid, side):
    """The rotary positions of the tokens, one for each latent position, are those of the blocks."""
    tiny_config.model.blocks = count
    sizes = schema.validate(tiny_config)  # of an 8 x 8 latent
    assert ((sizes.grid, sizes.columns), (sizes.block_side, sizes.block_width)) == (grid, side)
    z = np.arange(2 * 8 * 8 * 16).reshape(2, 8, 8, 16)
    blocks = np.asarray(codec.to_blocks(z, sizes))
    for i, j, p, q in np.ndindex(*grid, *side):
        place = side[0] * i + p, side[1] * j + q
        np.testing.assert_array_equal(blocks[:, grid[1] * i + j, side[1] * p + q], z[:, *place])
        rows, columns = rope.image_positions(grid[0], side[0], grid[1])
        assert (rows[grid[1] * i + j, side[1] * p + q], columns[grid[1] * i + j, side[1] * p + q]) == place
    np.testing.assert_array_equal(codec.from_blocks(blocks, sizes), z)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["alone", "in a program"])
def test_float_pixels_equal_a_division(wrap):
    """Compares every bit, so that old runs continue bit for bit."""
    pixels = np.arange(256, dtype=np.uint8)
    floats = np.asarray(wrap(codec.to_float)(pixels))
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, pixels / np.float32(127.5) - np.float32(1))


def test_pixel_codec_is_lossless(tiny_config):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
    pixel_codec = codec.build(tiny_config)
    z = pixel_codec.encode(pixel_codec.load(), {"image": images}, jax.random.key(0))
    assert z.shape == (3, 8, 8, 16)
    np.testing.assert_array_equal(pixel_codec.decode(pixel_codec.load(), z), codec.to_float(images))


def test_patch_of_pixels_becomes_the_channels_of_a_position():
    pixel_codec, images = codec.pixel(2), np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    z = np.asarray(pixel_codec.encode({}, {"image": images}, jax.random.key(0)))
    assert z.shape == (2, 2, 3, 12)
    for p in range(2):
        for q in range(2):
            np.testing.assert_array_equal(
                z[..., 6 * p + 3 * q : 6 * p + 3 * q + 3], codec.to_float(images)[:, p::2, q::2]
            )
