"""Tests of images with unusual metadata: read with the right pixels, or refused in one line."""

import io

import numpy as np
import pytest
from PIL import Image

from madformer_jax.data import preprocess
from tests.data import odd_images

TABLE = preprocess.Preprocessor(odd_images.SIDE, 3, crop=True)


def plain(name: str) -> np.ndarray:
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "PNG", "tif": "PNG"}[name.rpartition(".")[2]]
    kind = "PNG" if name == "tiff.jpg" else kind
    return TABLE.process(odd_images.encode(kind, **({"quality": 95} if kind == "JPEG" else {})))


@pytest.mark.parametrize("name", odd_images.TURNED)
def test_the_orientation_is_applied_whatever_lies_beside_it(name):
    np.testing.assert_array_equal(TABLE.process(odd_images.TURNED[name]), np.rot90(plain(name), -1))


@pytest.mark.parametrize("name", odd_images.UPRIGHT)
def test_pixels_that_decode_are_read_whatever_the_metadata(name):
    np.testing.assert_array_equal(TABLE.process(odd_images.UPRIGHT[name]), plain(name))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_each_orientation_is_the_one_that_exif_means(orientation, kind):
    stored = np.asarray(odd_images.picture())[:30]
    exif = Image.Exif()
    exif[0x112] = orientation
    file = io.BytesIO()
    Image.fromarray(stored).save(file, kind, exif=exif, lossless=True)
    shown = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1), 7: stored[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    table = preprocess.Preprocessor(30, 3, crop=True)
    np.testing.assert_array_equal(table.process(file.getvalue()), table.process(np.ascontiguousarray(shown)))


@pytest.mark.parametrize("name", odd_images.CORRUPT)
def test_other_files_are_corrupt_for_a_reason_of_one_line(name):
    content, words = odd_images.CORRUPT[name]
    with pytest.raises(preprocess.CorruptImageError, match=words) as caught:
        TABLE.process(content)
    assert "\n" not in str(caught.value) and " object at " not in str(caught.value)


def test_max_pixels_overrides_the_limit_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = odd_images.encode("PNG")
    assert TABLE._replace(max_pixels=1600).process(image).shape == (40, 40, 3)
    with pytest.raises(preprocess.CorruptImageError, match="40 x 40 pixels are more than config.data.max_pixels=1599"):
        TABLE._replace(max_pixels=1599).process(image)


def test_max_pixels_is_not_part_of_the_description():
    assert TABLE.describe() == TABLE._replace(max_pixels=1).describe()
    assert set(TABLE.describe()) == {"size", "channels", "crop", "background", "resize"}
