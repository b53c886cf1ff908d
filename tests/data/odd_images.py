"""Image files with unusual EXIF, large metadata, wrong suffixes or too many pixels."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

SIDE = 40
_ORIENTATION, _SHORT, _ASCII, _RATIONAL = 0x112, 3, 2, 5


def picture() -> Image.Image:
    y, x = np.mgrid[:SIDE, :SIDE]
    return Image.fromarray(np.stack([6 * x, 6 * y, 3 * (x + y)], -1).astype(np.uint8))


def encode(kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture().save(file, kind, **options)
    return file.getvalue()


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """Returns an entry of an EXIF directory. `value` is 4 bytes: the value, or its offset."""
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def exif(*entries: bytes, extra: bytes = b"") -> bytes:
    """Returns EXIF with one directory of n entries. `extra` starts at byte 14 + 12 n."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + extra


def after(entries: int) -> bytes:
    """Returns the offset of `extra` as the value of an entry."""
    return struct.pack("<I", 14 + 12 * entries)


def jpeg(segment: bytes, marker: int = 0xE1) -> bytes:
    """Returns a JPEG with an additional segment of metadata."""
    plain = encode("JPEG", quality=95)
    return plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


def png_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(*chunks: bytes) -> bytes:
    """Returns a PNG with additional chunks before its pixels."""
    plain = encode("PNG")
    start = plain.index(b"IDAT") - 4
    return plain[:start] + b"".join(chunks) + plain[start:]


def png_of_text(compressed: bool, international: bool = False) -> bytes:
    """Returns a PNG with 2 MiB of text, like the workflows that ComfyUI writes."""
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if international else info.add_text)("workflow", "x" * (2 << 20), zip=compressed)
    return encode("PNG", pnginfo=info)


def empty_png(width: int, height: int) -> bytes:
    """Returns a small PNG file whose header declares many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


SIX = entry(_ORIENTATION, _SHORT, 1, b"\x06\0")  # a quarter turn clockwise shows the image upright
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta> caption \xa8\xff </x:xmpmeta>"

# name -> file with orientation 6
TURNED = {
    "plain.jpg": jpeg(b"Exif\0\0" + exif(SIX)),
    "header twice.jpg": jpeg(b"Exif\0\0Exif\0\0" + exif(SIX)),
    "rational 0 by 0.jpg": jpeg(
        b"Exif\0\0" + exif(SIX, entry(0x11A, _RATIONAL, 1, after(2)), extra=struct.pack("<II", 0, 0))
    ),
    "text in a number.jpg": jpeg(b"Exif\0\0" + exif(SIX, entry(0x213, _ASCII, 2, b"1"))),
    "number in a text.jpg": jpeg(b"Exif\0\0" + exif(entry(0x10E, _SHORT, 1, b"\1\0"), SIX)),
    "bytes in a rational.jpg": jpeg(b"Exif\0\0" + exif(SIX, entry(0x11A, 7, 3, b"abc"))),
    "directory nowhere.jpg": jpeg(b"Exif\0\0" + exif(SIX, entry(0x8825, 4, 1, b"\xff\xff\xff\x7f"))),
    "directory of text.jpg": jpeg(b"Exif\0\0" + exif(SIX, entry(0x8769, _ASCII, 4, b"abc"))),
    "as text.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, _ASCII, 2, b"6"))),
    "as a rational.jpg": jpeg(
        b"Exif\0\0" + exif(entry(_ORIENTATION, _RATIONAL, 1, after(1)), extra=struct.pack("<II", 6, 1))
    ),
    "as a byte.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, 1, 1, b"\x06"))),
    "two values.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, _SHORT, 2, b"\x06\0\x06\0"))),
    "chunk.png": png(png_chunk(b"eXIf", exif(SIX))),
    "chunk beside a large text.png": png(
        png_chunk(b"eXIf", exif(SIX)), png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 << 20)))
    ),
    "xmp beside a large text.png": png(
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation>6</tiff:Orientation>"),
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 << 20))),
    ),
    "odd.webp": encode("WEBP", lossless=True, exif=b"Exif\0\0" + exif(SIX, entry(0x213, _ASCII, 2, b"1"))),
}

# name -> file whose pixels are stored upright
UPRIGHT = {
    "plain.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, _SHORT, 1, b"\1\0"))),
    "xmp not utf-8.jpg": jpeg(XMP),
    "exif empty.jpg": jpeg(b"Exif\0\0"),
    "exif garbage.jpg": jpeg(b"Exif\0\0" + b"garbage!" * 4),
    "exif cut off.jpg": jpeg(b"Exif\0\0" + exif(SIX)[:14]),
    "exif elsewhere.jpg": jpeg(b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "profile cut off.jpg": jpeg(b"ICC_PROFILE\0", 0xE2),
    "header cut off.jpg": jpeg(b"JFIF\0", 0xE0),
    "orientation 0.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, _SHORT, 1, b"\0\0"))),
    "orientation 9.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, _SHORT, 1, b"\x09\0"))),
    "orientation of words.jpg": jpeg(b"Exif\0\0" + exif(entry(_ORIENTATION, _ASCII, 4, b"top"))),
    "orientation 6 by 0.jpg": jpeg(
        b"Exif\0\0" + exif(entry(_ORIENTATION, _RATIONAL, 1, after(1)), extra=struct.pack("<II", 6, 0))
    ),
    "bytes behind the end.jpg": encode("JPEG", quality=95) + bytes(4096),
    "zTXt of 2 MiB.png": png_of_text(compressed=True),
    "iTXt of 2 MiB.png": png_of_text(compressed=True, international=True),
    "tEXt of 2 MiB.png": png_of_text(compressed=False),
    "profile of 2 MiB.png": encode("PNG", icc_profile=bytes(2 << 20)),
    "text of 70 MiB.png": png(*[png_chunk(b"tEXt", b"workflow\0" + bytes(14 << 20))] * 5),
    "exif garbage.png": png(png_chunk(b"eXIf", b"garbage")),
    "checksum of a text.png": png(png_chunk(b"tEXt", b"Comment\0a", checksum=1)),
    "checksum of the exif.png": png(png_chunk(b"eXIf", exif(SIX), checksum=1)),
    "directory nowhere.tif": encode("TIFF", tiffinfo={0xA005: 2**31 - 1}),
    "xmp of numbers.tif": encode("TIFF", tiffinfo={700: (1, 2, 3)}),
    "bmp.png": encode("BMP"),
    "tiff.jpg": encode("TIFF"),
    "first of two.webp": encode("WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
    "first of two.png": encode("PNG", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
}

# name -> file, words of the reason
CORRUPT = {
    "empty.png": (b"", "cannot identify image file"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify image file"),
    "header alone.png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "."),  # the words depend on the version of Pillow
    "cut off.webp": (encode("WEBP")[:-40], "."),
    "cut off.jpg": (encode("JPEG")[:-40], "truncated"),
    "cut off.png": (png_of_text(compressed=True)[:-40], "truncated"),
    "bomb.png": (
        empty_png(15_000, 15_000),
        "^15000 x 15000 pixels are more than config.data.max_pixels=179000000. Raise it",
    ),
    "bomb of 2 ** 62 pixels.png": (empty_png(2**31 - 1, 2**31 - 1), "config.data.max_pixels"),
}
