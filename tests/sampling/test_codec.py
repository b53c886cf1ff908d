import jax
import numpy as np
import pytest

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.sampling import codec


def test_blocks_and_positions_are_in_raster_order(tiny_config):
    sizes = derive_sizes(tiny_config)  # 8 x 8 latent in 2 x 2 blocks
    z = np.arange(2 * 8 * 8 * 16).reshape(2, 8, 8, 16)
    blocks = np.asarray(codec.to_blocks(z, sizes))
    for i in range(2):
        for j in range(2):
            for p in range(4):
                for q in range(4):
                    np.testing.assert_array_equal(blocks[:, 2 * i + j, 4 * p + q], z[:, 4 * i + p, 4 * j + q])
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
