"""Recorded frames of images coming into being as one HTML file, which needs no server: two settings side by side at equal cost.

From one frame to the next only the block that is being made changes, so a frame is stored as the rectangle that changed. The
rectangles of an image make one sheet, a WebP; the page's script (gallery.html) lays them over each other.
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

MAX_BYTES = 3_000_000  # bytes of a page, above which it is too slow to open from afar
MAX_IMAGE_SIDE = 128  # pixels of an image on the page, at most: larger ones are averaged down

# How sheets become smaller, tried in turn: the quality of WebP (None: no loss), and of how many steps within a block one is kept.
_COMPRESSION_LEVELS = ((None, 1), (90, 1), (75, 1), (75, 2), (60, 4), (50, 8), (50, 1000))


class Frame(NamedTuple):
    """Where a drawing stands, and what it has cost."""

    block: int  # 1..L
    step: int  # 1..steps, of the solver, in this block
    passes: float  # full-model passes over an image, see `flops.model_passes`
    seconds: float


class Recording(NamedTuple):
    """The same images coming into being at one setting."""

    name: str
    frames: list[Frame]  # F
    images: np.ndarray  # (F, n, h, w, c) uint8


class SheetBox(NamedTuple):
    """A rectangle of an image, and where it lies on the image's sheet."""

    top: int
    left: int
    height: int
    width: int
    sheet_top: int
    sheet_left: int


def render(
    title: str, about: str, captions: Sequence[str], recordings: Sequence[Recording], largest: int = MAX_BYTES
) -> str:
    """The page. Its pictures are exact where that fits, else compressed with loss, else with fewer frames within a block.

    Args:
      captions: of the n images that every recording has.
      largest: bytes of the page.

    Raises:
      ConfigError: it does not fit.
    """
    empty = _render_html(title, about, captions, [])
    for quality, stride in _COMPRESSION_LEVELS:
        room, told = largest - len(empty.encode()), []
        for recording in recordings:
            told.append(_recording_data(_drop_frames(recording, stride), quality, room))
            room -= len(json.dumps(told[-1]))
            if room < 0:
                break
        else:
            return _render_html(title, about, captions, told)
    raise ConfigError(
        f"{len(recordings)} settings of {len(captions)} images do not fit a page of {largest / 1e6:g} MB: choose fewer settings "
        "(config.gallery.grid) or images (config.gallery.n)."
    )


def downscale(images: np.ndarray) -> np.ndarray:
    """uint8 images (n, H, W, c) with at most `SIDE` pixels a side, averaged."""
    factor = math.ceil(max(images.shape[1:3]) / MAX_IMAGE_SIDE)
    if factor == 1:
        return images
    pictures = [np.asarray(preprocess.to_pil(image).reduce(factor)) for image in images]
    return np.stack(pictures).reshape(len(images), *pictures[0].shape[:2], images.shape[-1])


def _render_html(title: str, about: str, captions: Sequence[str], told: Sequence[dict[str, Any]]) -> str:
    template = (importlib.resources.files(__package__) / "gallery.html").read_text(encoding="utf-8")
    content = json.dumps({"captions": list(captions), "recordings": told}).replace("<", "\\u003c")
    for name, text in (("title", html.escape(title)), ("about", html.escape(about)), ("content", content)):
        template = template.replace(f"[[{name}]]", text)
    return template


def _recording_data(recording: Recording, quality: int | None, room: int) -> dict[str, Any]:
    """What the page's script reads of a recording; sheets that pass `room` bytes are left off."""
    boxes = _pack_boxes(list(_change_boxes(recording.images)))
    sheets: list[str] = []
    for number in range(recording.images.shape[1]):
        content = _encode_webp(_sprite_sheet(recording.images[:, number], boxes), quality)
        sheets.append("data:image/webp;base64," + base64.b64encode(content).decode())
        room -= len(sheets[-1])
        if room < 0:
            break
    return {
        "name": recording.name,
        "size": recording.images.shape[2:4],
        "frames": [(f.block, f.step, round(f.passes, 4), round(f.seconds, 4)) for f in recording.frames],
        "boxes": boxes,
        "sheets": sheets,
    }


def _drop_frames(recording: Recording, stride: int) -> Recording:
    """Of the frames within a block, each `stride`-th; the last one of a block always."""
    frames = recording.frames
    last = {frame.block: i for i, frame in enumerate(frames)}  # of each block
    kept = [i for i, frame in enumerate(frames) if frame.step % stride == 0 or i == last[frame.block]]
    return recording._replace(frames=[frames[i] for i in kept], images=recording.images[kept])


def _change_boxes(images: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Top, left, height and width of what changes in any image (F, n, h, w, c) at each frame; at the first, all."""
    yield 0, 0, *images.shape[2:4]
    for before, after in itertools.pairwise(images):
        changed = (before != after).any((0, 3))
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        if len(rows):
            yield int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        else:
            yield 0, 0, 1, 1


def _pack_boxes(changes: Sequence[tuple[int, int, int, int]]) -> list[SheetBox]:
    """Places rectangles on a sheet, row after row, in a square about."""
    wide = max(max(w for *_, w in changes), math.isqrt(sum(h * w for *_, h, w in changes)))
    boxes, top, left, tall = [], 0, 0, 0
    for change in changes:
        height, width = change[2:]
        if left + width > wide:
            top, left, tall = top + tall, 0, 0
        boxes.append(SheetBox(*change, top, left))
        left, tall = left + width, max(tall, height)
    return boxes


def _sprite_sheet(images: np.ndarray, boxes: Sequence[SheetBox]) -> np.ndarray:
    """The rectangles of one image's frames (F, h, w, c) side by side."""
    tall = max(b.sheet_top + b.height for b in boxes)
    wide = max(b.sheet_left + b.width for b in boxes)
    sheet = np.zeros((tall, wide, images.shape[-1]), np.uint8)
    for image, b in zip(images, boxes, strict=True):
        sheet[b.sheet_top : b.sheet_top + b.height, b.sheet_left : b.sheet_left + b.width] = image[
            b.top : b.top + b.height, b.left : b.left + b.width
        ]
    return sheet


def _encode_webp(image: np.ndarray, quality: int | None) -> bytes:
    file = io.BytesIO()
    how = {"lossless": True} if quality is None else {"quality": quality}
    preprocess.to_pil(image).convert("RGB").save(file, "webp", method=4, **how)
    return file.getvalue()
