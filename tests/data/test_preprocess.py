"""Tests of image preprocessing."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photo() -> np.ndarray:
    y, x = np.mgrid[:40, :60]
    return np.stack([4 * x, 6 * y, 128 + 100 * np.sin(x * y / 90)], -1).astype(np.uint8)


def test_equals_pillows_own_resize_then_crop(photo):
    got = preprocess.Preprocessor(20, 3, crop=True).process(encode(photo))
    wanted = np.asarray(Image.fromarray(photo).resize((30, 20), Image.Resampling.BICUBIC))[:, 5:25]
    assert got.shape == (20, 20, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - wanted).max() <= 1  # a single pass rounds once less


def test_without_crop_the_image_is_squeezed(photo):
    got = preprocess.Preprocessor(20, 3, crop=False).process(photo)
    np.testing.assert_array_equal(got, Image.fromarray(photo).resize((20, 20), Image.Resampling.BICUBIC))


def test_an_image_of_the_right_size_keeps_its_pixels(photo):
    square = photo[:, :40]
    np.testing.assert_array_equal(preprocess.Preprocessor(40, 3, crop=True).process(encode(square)), square)
    np.testing.assert_array_equal(preprocess.Preprocessor(40, 3, crop=True).process(square), square)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
def test_every_mode_is_converted_to_the_channels_of_the_config(photo, mode, channels):
    file = io.BytesIO()
    Image.fromarray(photo).convert(mode).save(file, "TIFF")
    assert preprocess.Preprocessor(16, channels, crop=True).process(file.getvalue()).shape == (16, 16, channels)


def png(depth: int, kind: int, rows: np.ndarray, *extra: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG file of raw samples.

    Args:
      depth: Bits per sample.
      kind: Color type: 0 gray, 2 RGB, 3 palette, 4 LA, 6 RGBA.
      rows: Samples (H, W, values).
      *extra: Further chunks, (name, content).
    """
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, kind, 0, 0, 0)
    data = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_not_cut_off(channels):
    values = np.array([[0, 128, 129, 257 * 100, 65535 - 128, 65535]])[..., None]
    table = preprocess.Preprocessor(1, channels, crop=False)
    gray = [table.process(png(16, 0, values[:, i : i + 1]))[0, 0].tolist() for i in range(6)]
    assert gray == [[k] * channels for k in (0, 0, 1, 100, 255, 255)]
    for kind, values in (2, [[[0, 257 * 100, 65535]]]), (6, [[[0, 257 * 100, 65535, 65535]]]):
        assert preprocess.Preprocessor(1, 3, crop=False).process(png(16, kind, np.array(values))).tolist() == [
            [[0, 100, 255]]
        ]


PALETTE = (b"PLTE", bytes([200, 0, 0, 0, 200, 0])), (b"tRNS", bytes([0, 255]))


@pytest.mark.parametrize(
    "file",
    [
        png(8, 6, np.array([[[200, 0, 0, 0], [0, 200, 0, 255]]])),
        png(16, 6, np.array([[[51400, 0, 0, 0], [0, 51400, 0, 65535]]])),
        png(8, 3, np.array([[[0], [1]]]), *PALETTE),
        png(8, 2, np.array([[[200, 0, 0], [0, 200, 0]]]), (b"tRNS", struct.pack(">HHH", 200, 0, 0))),
    ],
    ids=["RGBA", "RGBA of 16 bits", "palette", "one color"],
)
def test_transparent_pixels_show_the_background(file):
    for background in ("#ffffff", "#102030"):
        got = preprocess.Preprocessor(2, 3, crop=False, background=background).process(file)  # 2 x 1 squeezed to 2 x 2
        assert got[0].tolist() == [list(bytes.fromhex(background[1:])), [0, 200, 0]]


@pytest.mark.parametrize(
    "file",
    [
        png(8, 4, np.array([[[200, 0], [100, 255]]])),
        png(8, 0, np.array([[[200], [100]]]), (b"tRNS", struct.pack(">H", 200))),
        png(16, 0, np.array([[[51400], [25700]]]), (b"tRNS", struct.pack(">H", 51400))),
    ],
    ids=["LA", "one gray", "one gray of 16 bits"],
)
def test_transparent_gray_pixels_show_the_background(file):
    got = preprocess.Preprocessor(2, 1, crop=False, background="#303030").process(file)
    assert got[0, :, 0].tolist() == [0x30, 100]


def test_half_transparent_pixels_are_blended():
    file = png(8, 6, np.array([[[0, 0, 0, 127]]]))
    assert abs(int(preprocess.Preprocessor(1, 3, crop=False).process(file)[0, 0, 0]) - 128) <= 1


def test_colors_are_converted_to_hex():
    assert (
        preprocess.hex_color("white")
        == preprocess.hex_color("#fff")
        == "#ffffff"
        == preprocess.Preprocessor(1, 1, True).background
    )
    for wrong in ("whight", "", "#12345", "#ffffff80"):
        with pytest.raises(ConfigError, match="config.data.background='.*' is not a color"):
            preprocess.hex_color(wrong)


def test_pixels_without_a_known_range_are_corrupt(photo):
    file = io.BytesIO()
    Image.fromarray(photo[..., 0].astype(np.float32)).save(file, "TIFF")
    with pytest.raises(preprocess.CorruptImageError, match="mode F have no known range"):
        preprocess.Preprocessor(4, 1, crop=True).process(file.getvalue())


def test_lack_of_memory_does_not_make_an_image_corrupt(photo, monkeypatch):
    def out_of_memory(*args):
        raise MemoryError

    monkeypatch.setattr(preprocess, "_open", out_of_memory)
    with pytest.raises(MemoryError):
        preprocess.Preprocessor(4, 3, crop=True).process(encode(photo))
