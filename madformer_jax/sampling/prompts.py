"""What a model that reads captions is told to draw, and pictures with their prompts below them."""

import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from madformer_jax.config import fields
from madformer_jax.data import sources, text
from madformer_jax.data.drawings import pictures
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_DATA_PREFIX = "data:"  # and a split: its captions
_MIN_IMAGE_WIDTH = 128  # pixels: smaller pictures are shown larger, so that there is room for words
_FONT_SIZE, _LINE_HEIGHT = 11, 13  # pixels


def load(c: ConfigDict) -> list[str]:
    """The prompt of each of the `sample.n` images: those of `sample.prompts` in turn. Empty for a model without captions.

    Raises:
      ConfigError: there is none, or the file or the split that holds them cannot be read.
    """
    if not c.text.vocabulary:
        return []
    given, n = c.sample.prompts, c.sample.n
    literal = fields.json_list(given)
    if literal is not None:
        found = [_literal(prompt) for prompt in literal]
    elif given.startswith(_DATA_PREFIX):
        source, numbers = _dataset_records(c)
        found = text.record_texts(c, source, numbers)
    elif given.endswith(".txt"):
        with storage.wrap_errors(f"config.sample.prompts={given!r} cannot be read"):
            found = storage.read_text(given).split("\n")  # a prompt may hold U+2028, at which splitlines would cut
    else:
        found = given.split(";")
    found = [text.strip_bom(prompt, "config.sample.prompts") for prompt in found]
    if literal is None:
        found = [prompt.strip() for prompt in found if prompt.strip()]
    if not found:
        raise ConfigError(
            f"config.sample.prompts={given!r} holds no prompt: say what to draw, as in 'a red planet; a blue planet', or name a "
            ".txt file with one a line, or the captions of a split as 'data:test'."
        )
    return [found[i % len(found)] for i in range(n)]


def from_python(value: Any) -> str:
    """Returns prompts of a Python caller or of the demo as a value of `sample.prompts`.

    The value is a JSON list, whose texts are drawn as they are: none of them names a file or a split.

    Args:
      value: One prompt, or a sequence of prompts.

    Raises:
      ConfigError: The value is neither.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Iterable) or isinstance(items, Mapping | Set | bytes):
        raise ConfigError(f"prompts={reprlib.repr(value)} must be a text or a list of texts.")
    return json.dumps([_literal(prompt) for prompt in items])


def _literal(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ConfigError(f"config.sample.prompts: {reprlib.repr(prompt)} must be a text.")
    return str(prompt)


def _dataset_records(c: ConfigDict) -> tuple[Source, np.ndarray]:
    """The source of the split that `sample.prompts` names, and which of its records."""
    c = c.copy_and_resolve_references()
    c.data.split = c.sample.prompts.removeprefix(_DATA_PREFIX)
    source = sources.open_source(c)
    return source, np.arange(min(c.sample.n, len(source)))


def uses_drawing_captions(c: ConfigDict) -> bool:
    """Whether a model reads the captions of drawings, of which every attribute is known that they name."""
    return bool(c.text.vocabulary) and c.text.caption == "caption" and c.data.source == "drawings"


def requested_attributes(c: ConfigDict) -> np.ndarray | None:
    """The attributes that the prompts ask for, int32 (n, A), 0 for none; None where they are no captions of drawings."""
    if not uses_drawing_captions(c) or not c.sample.prompts.startswith(_DATA_PREFIX):
        return None
    source, numbers = _dataset_records(c)
    rows = source.read(numbers).attributes
    return None if rows is None else pictures.captioned_attributes(rows)[np.arange(c.sample.n) % len(numbers)]


def tokenize(c: ConfigDict) -> text.TokenizedTexts | None:
    """The prompts of all images as tokens; None for a model without captions.

    Raises:
      ConfigError: as `of` and `text.encode`.
    """
    prompts = load(c)
    return text.encode(c, prompts, lambda i: "config.sample.prompts") if prompts else None


def describe(c: ConfigDict, tokens: text.TokenizedTexts | None = None) -> dict[str, Any]:
    """What of the text decides images, for a protocol; nothing without captions. `tokens`: the result of `texts`, if known."""
    tokens = tokens or tokenize(c)
    if tokens is None:
        return {}
    return {
        "asked": c.sample.prompts,
        "prompts": load(c),
        "tokens": hashlib.sha256(b"".join(x.tobytes() for x in tokens)).hexdigest(),
    }


def add_caption_strips(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Images uint8 (n, H, W, c), each with its prompt in a strip of white below it: (n, H', W', 3).

    Small ones are shown larger. As they are where there are no prompts.
    """
    if not prompts:
        return images
    times = math.ceil(_MIN_IMAGE_WIDTH / images.shape[2])
    height, width = (times * side for side in images.shape[1:3])
    font = ImageFont.load_default(_FONT_SIZE)
    wrapped = [_wrap_lines(prompt, width, font) for prompt in prompts]
    strip = _LINE_HEIGHT * max(map(len, wrapped)) + 4
    cells = []
    for image, lines in zip(images, wrapped, strict=True):
        cell = Image.new("RGB", (width, height + strip), "white")
        cell.paste(
            Image.fromarray(image.repeat(3 // image.shape[-1], axis=-1)).resize(
                (width, height), Image.Resampling.NEAREST
            )
        )
        for k, line in enumerate(lines):
            ImageDraw.Draw(cell).text((2, height + 2 + _LINE_HEIGHT * k), line, "black", font)
        cells.append(np.asarray(cell))
    return np.stack(cells)


def _wrap_lines(prompt: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The prompt in lines of at most `width` pixels, as far as its words allow."""
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 4:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
