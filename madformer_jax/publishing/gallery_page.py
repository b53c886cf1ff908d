"""The gallery page: frames of sampling as one HTML file, two settings side by side at equal cost.

`modes.gallery` records the frames and calls `render`. The page needs no server. Between two frames only
the current block changes, so a frame is stored as the rectangle that changed. The rectangles of an
image form one sprite sheet, a WebP file. The script in gallery.html draws them over each other.
"""

import base64
import html
import importlib.resources
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError

MAX_BYTES = 3_000_000  # size of a page; larger ones load slowly from a web server
MAX_IMAGE_SIDE = 128  # pixels of an image on the page; larger images are averaged down

# (quality of WebP or None for lossless, stride of the frames within a block), tried in turn.
_COMPRESSION_LEVELS = ((None, 1), (90, 1), (75, 1), (75, 2), (60, 4), (50, 8), (50, 1000))


class Frame(NamedTuple):
    """Progress and cost of sampling at a frame."""

    block: int  # the current one, 1 to L
    step: int  # solver steps done in this block, at least 1
    passes: float  # full-model passes so far, per image (`flops.model_passes`)
    seconds: float  # so far, per image


class Recording(NamedTuple):
    """The frames of sampling n images with one setting."""

    name: str  # of the setting
    frames: list[Frame]  # F of them
    images: np.ndarray  # at each frame, uint8 (F, n, h, w, c)


class SheetBox(NamedTuple):
    """A rectangle of an image and its position on the sprite sheet."""

    top: int
    left: int
    height: int
    width: int
    sheet_top: int
    sheet_left: int


def render(
    title: str, description: str, captions: Sequence[str], recordings: Sequence[Recording], max_bytes: int = MAX_BYTES
) -> str:
    """Returns the page as HTML.

    The images are lossless if they fit. Otherwise they are compressed with loss, and then the page also
    gets fewer frames within a block. Every recording has the same n images; `captions[k]` is the caption of image k.

    Raises:
      ConfigError: The page does not fit.
    """
    empty = _render_html(title, description, captions, [])
    for quality, stride in _COMPRESSION_LEVELS:
        bytes_left, data = max_bytes - len(empty.encode()), []
        for recording in recordings:
            data.append(_recording_data(_drop_frames(recording, stride), quality, bytes_left))
            bytes_left -= len(json.dumps(data[-1]))
            if bytes_left < 0:
                break
        else:
            return _render_html(title, description, captions, data)
    raise ConfigError(
        f"{len(recordings)} settings of {len(captions)} images do not fit a page of {max_bytes / 1e6:g} MB: choose fewer settings "
        "(config.gallery.grid) or images (config.gallery.n)."
    )


def downscale(images: np.ndarray) -> np.ndarray:
    """Averages uint8 images `(n, H, W, c)` down to at most `MAX_IMAGE_SIDE` pixels a side."""
    factor = math.ceil(max(images.shape[1:3]) / MAX_IMAGE_SIDE)
    if factor == 1:
        return images
    pictures = [np.asarray(preprocess.to_pil(image).reduce(factor)) for image in images]
    return np.stack(pictures).reshape(len(images), *pictures[0].shape[:2], images.shape[-1])


def _render_html(title: str, description: str, captions: Sequence[str], data: Sequence[dict[str, Any]]) -> str:
    template = (importlib.resources.files(__package__) / "gallery.html").read_text(encoding="utf-8")
    content = json.dumps({"captions": list(captions), "recordings": data}).replace("<", "\\u003c")
    for name, text in (("title", html.escape(title)), ("description", html.escape(description)), ("content", content)):
        template = template.replace(f"[[{name}]]", text)
    return template


def _recording_data(recording: Recording, quality: int | None, bytes_left: int) -> dict[str, Any]:
    """Returns the data of a recording for the script of the page.

    Stops adding sheets once they exceed `bytes_left`: the caller then tries a smaller quality.
    """
    boxes = _pack_boxes(list(_change_boxes(recording.images)))
    sheets: list[str] = []
    for number in range(recording.images.shape[1]):
        content = _encode_webp(_sprite_sheet(recording.images[:, number], boxes), quality)
        sheets.append("data:image/webp;base64," + base64.b64encode(content).decode())
        bytes_left -= len(sheets[-1])
        if bytes_left < 0:
            break
    return {
        "name": recording.name,
        "size": recording.images.shape[2:4],
        "frames": [(f.block, f.step, round(f.passes, 4), round(f.seconds, 4)) for f in recording.frames],
        "boxes": boxes,
        "sheets": sheets,
    }


def _drop_frames(recording: Recording, stride: int) -> Recording:
    """Keeps every `stride`-th frame within a block and the last frame of each block."""
    frames = recording.frames
    last = {frame.block: i for i, frame in enumerate(frames)}  # block -> its last frame
    selected = [i for i, frame in enumerate(frames) if frame.step % stride == 0 or i == last[frame.block]]
    return recording._replace(frames=[frames[i] for i in selected], images=recording.images[selected])


def _change_boxes(images: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yields (top, left, height, width) of the rectangle that changes at each frame, the first time the whole image."""
    yield 0, 0, *images.shape[2:4]
    for before, after in itertools.pairwise(images):
        changed = (before != after).any((0, 3))
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        if len(rows):
            yield int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        else:
            yield 0, 0, 1, 1


def _pack_boxes(changes: Sequence[tuple[int, int, int, int]]) -> list[SheetBox]:
    """Places rectangles on a nearly square sprite sheet, row by row."""
    sheet_width = max(max(w for *_, w in changes), math.isqrt(sum(h * w for *_, h, w in changes)))
    boxes, top, left, row_height = [], 0, 0, 0
    for change in changes:
        height, width = change[2:]
        if left + width > sheet_width:
            top, left, row_height = top + row_height, 0, 0
        boxes.append(SheetBox(*change, top, left))
        left, row_height = left + width, max(row_height, height)
    return boxes


def _sprite_sheet(images: np.ndarray, boxes: Sequence[SheetBox]) -> np.ndarray:
    """Copies the changed rectangles of an image's frames `(F, h, w, c)` to their places on a sheet."""
    height = max(b.sheet_top + b.height for b in boxes)
    width = max(b.sheet_left + b.width for b in boxes)
    sheet = np.zeros((height, width, images.shape[-1]), np.uint8)
    for image, b in zip(images, boxes, strict=True):
        sheet[b.sheet_top : b.sheet_top + b.height, b.sheet_left : b.sheet_left + b.width] = image[
            b.top : b.top + b.height, b.left : b.left + b.width
        ]
    return sheet


def _encode_webp(image: np.ndarray, quality: int | None) -> bytes:
    file = io.BytesIO()
    options = {"lossless": True} if quality is None else {"quality": quality}
    preprocess.to_pil(image).convert("RGB").save(file, "webp", method=4, **options)
    return file.getvalue()
