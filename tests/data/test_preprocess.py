"""The preprocessing table."""

import io

import numpy as np
import pytest
from PIL import Image

from madformer_jax.data import preprocess


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photo() -> np.ndarray:
    y, x = np.mgrid[:40, :60]
    return np.stack([4 * x, 6 * y, 128 + 100 * np.sin(x * y / 90)], -1).astype(np.uint8)


def test_equals_pillows_own_resize_then_crop(photo):
    got = preprocess.Table(20, 3, crop=True).pixels(encode(photo))
    wanted = np.asarray(Image.fromarray(photo).resize((30, 20), Image.Resampling.BICUBIC))[:, 5:25]
    assert got.shape == (20, 20, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - wanted).max() <= 1  # one pass rounds once less


def test_without_crop_the_image_is_squeezed(photo):
    got = preprocess.Table(20, 3, crop=False).pixels(photo)
    np.testing.assert_array_equal(got, Image.fromarray(photo).resize((20, 20), Image.Resampling.BICUBIC))


def test_an_image_of_the_right_size_keeps_its_pixels(photo):
    square = photo[:, :40]
    np.testing.assert_array_equal(preprocess.Table(40, 3, crop=True).pixels(encode(square)), square)
    np.testing.assert_array_equal(preprocess.Table(40, 3, crop=True).pixels(square), square)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_the_asked_channels(photo, mode, channels):
    file = io.BytesIO()
    Image.fromarray(photo).convert(mode).save(file, "TIFF")
    assert preprocess.Table(16, channels, crop=True).pixels(file.getvalue()).shape == (16, 16, channels)


def test_exif_orientation_is_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half
    turned = preprocess.Table(20, 3, crop=False).pixels(encode(photo, exif=exif))
    np.testing.assert_array_equal(turned, preprocess.Table(20, 3, crop=False).pixels(photo[::-1, ::-1].copy()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_corrupt_not_grey(photo, kind):
    file = encode(photo, kind)
    with pytest.raises(preprocess.CorruptImageError):
        preprocess.Table(20, 3, crop=True).pixels(file[: len(file) // 2])


@pytest.mark.parametrize("file", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_file_that_is_no_image_is_corrupt(file):
    with pytest.raises(preprocess.CorruptImageError) as error:
        preprocess.Table(20, 3, crop=True).pixels(file)
    assert " object at " not in str(error.value)


def test_range_is_minus_one_to_one():
    got = preprocess.to_float(np.array([[0, 255, 51]], np.uint8))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[-1, 1, -0.6]], atol=1e-7)
