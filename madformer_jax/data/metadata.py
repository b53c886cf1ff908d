"""Metadata of image files: reading the EXIF orientation, and removing metadata that Pillow refuses.

`preprocess` uses it to decode files. Pixels need no metadata, so damaged metadata never makes an
image corrupt. To support another file format, add a function to `_SPLITTERS`.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import ExifTags, Image

_ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_transpose(image: Image.Image) -> Image.Transpose | None:
    """Returns the operation that turns a decoded image upright, read from its EXIF orientation.

    The orientation may be a number of any type, or several, of which the first counts.

    Returns:
      None if the image is upright, or if its orientation is missing or damaged.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        if isinstance(value, bytes):
            value = value[0] if value[0] <= 8 else value.decode("ascii").strip("\0 ")
        return _ORIENTATION_TRANSPOSES.get(float(value[0] if isinstance(value, tuple) else value))  # type: ignore[arg-type, call-overload]
    except Exception:  # damaged metadata raises almost any type
        return None


class _Segment(NamedTuple):
    """A run of bytes of a file."""

    kind: str  # "pixels", "orientation" or "other"
    content: bytes
    substitute: bytes = b""  # written instead of `content` if the segment is left out


def stripped_variants(content: bytes) -> Iterator[bytes]:
    """Yields a file unchanged, then with only its orientation as metadata, then without metadata.

    Pillow refuses PNG files with text or a color profile above 1 MiB, and files with certain kinds
    of damaged metadata.
    """
    yield content
    split = next((split for magic, split in _SPLITTERS.items() if content.startswith(magic)), None)
    if split is not None:
        segments = list(split(content))
        for kinds in (("pixels", "orientation"), ("pixels",)):
            yield b"".join(s.content if s.kind in kinds else s.substitute for s in segments)


_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of text chunks with EXIF


def _split_png(content: bytes) -> Iterator[_Segment]:
    yield _Segment("pixels", _PNG_MAGIC)
    start = len(_PNG_MAGIC)
    while start < len(content):
        end = len(content)  # if the file is truncated
        if start + 12 <= end:
            end = min(end, start + 12 + struct.unpack(">I", content[start : start + 4])[0])
        chunk, kind = content[start:end], "pixels"
        if chunk[4:8] in _PNG_METADATA:
            is_intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
            has_orientation = chunk[4:8] == b"eXIf" or chunk[8:].startswith(_PNG_ORIENTATION)
            kind = "orientation" if is_intact and has_orientation else "other"
        yield _Segment(kind, chunk)
        start = end


_JPEG_MAGIC = b"\xff\xd8"
_SCAN, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE


def _split_jpeg(content: bytes) -> Iterator[_Segment]:
    yield _Segment("pixels", _JPEG_MAGIC)
    start = len(_JPEG_MAGIC)
    while start + 4 <= len(content) and content[start] == 0xFF and content[start + 1] != _SCAN:
        marker, length = struct.unpack(">BH", content[start + 1 : start + 4])
        kind = "pixels"  # also for APP14, Adobe's segment, which names the color space
        if marker == _APP1:  # EXIF and XMP
            kind = "orientation"
        elif (_APP0 <= marker <= _APP15 and marker != _APP14) or marker == _COMMENT:
            kind = "other"
        yield _Segment(kind, content[start : start + 2 + length])
        start += 2 + length
    yield _Segment("pixels", content[start:])


# Tags of XMP, IPTC, Photoshop, Exif, ICC, GPS and Interoperability.
_TIFF_METADATA = {700, 33723, 34377, 34665, 34675, 34853, 40965}
_TIFF_ENTRY_BYTES = 12


def _split_tiff(content: bytes) -> Iterator[_Segment]:
    order = "<" if content[:2] == b"II" else ">"
    unused = struct.pack(f"{order}HHII", 65000, 1, 1, 0)
    start = struct.unpack_from(f"{order}I", content, 4)[0] + 2 if len(content) >= 8 else len(content)
    count = struct.unpack_from(f"{order}H", content, start - 2)[0] if start <= len(content) else 0
    end = min(start + _TIFF_ENTRY_BYTES * count, len(content))
    yield _Segment("pixels", content[:start])
    for entry in (content[i : i + _TIFF_ENTRY_BYTES] for i in range(start, end, _TIFF_ENTRY_BYTES)):
        tag = int.from_bytes(entry[:2], "little" if order == "<" else "big")
        kind = "orientation" if tag == ExifTags.Base.Orientation else "other" if tag in _TIFF_METADATA else "pixels"
        yield _Segment(kind, entry, unused)
    yield _Segment("pixels", content[max(start, end) :])


_SPLITTERS = {_PNG_MAGIC: _split_png, _JPEG_MAGIC: _split_jpeg, b"II*\0": _split_tiff, b"MM\0*": _split_tiff}
