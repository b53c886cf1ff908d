"""Prompts: reading, tokenizing and describing them, and showing them below images.

Every mode that draws reads `sample.prompts` here. Add another kind of source to `load`.
"""

import hashlib
import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from madformer_jax.config import fields
from madformer_jax.data import sources, text
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_DATA_PREFIX = "data:"  # followed by the split whose captions are the prompts
_MIN_IMAGE_WIDTH = 128  # pixels; smaller images are enlarged, so that words fit below them
_FONT_SIZE, _LINE_HEIGHT = 11, 13  # pixels


def load(c: ConfigDict) -> list[str]:
    """Returns the prompt of each of the `sample.n` images.

    Images take those of `sample.prompts` in turn. The list is empty for a model without captions.

    Raises:
      ConfigError: No prompt is set, or the file or the split of the prompts cannot be read.
    """
    if not c.text.vocabulary:
        return []
    value, n = c.sample.prompts, c.sample.n
    literal = fields.json_list(value)
    if literal is not None:
        prompts = [_literal(prompt) for prompt in literal]
    elif value.startswith(_DATA_PREFIX):
        source, numbers = _dataset_records(c)
        prompts = text.record_texts(c, source, numbers)
    elif value.endswith(".txt"):
        with storage.wrap_errors(f"config.sample.prompts={value!r} cannot be read"):
            prompts = storage.read_text(value).split("\n")  # splitlines would split at U+2028
    else:
        prompts = value.split(";")
    prompts = [text.strip_bom(prompt, "config.sample.prompts") for prompt in prompts]
    if literal is None:
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ConfigError(
            f"config.sample.prompts={value!r} holds no prompt: say what to draw, as in 'a red planet; a blue planet', or name a "
            ".txt file with one a line, or the captions of a split as 'data:test'."
        )
    return [prompts[i % len(prompts)] for i in range(n)]


def from_python(value: Any) -> str:
    """Converts prompts of a Python caller or of the demo to a value of `sample.prompts`.

    The value is a JSON list. Its texts are literal: none of them names a file or a split.

    Args:
      value: One prompt, or a sequence of prompts.

    Raises:
      ConfigError: The value is neither a text nor a sequence of texts.
    """
    items = [value] if isinstance(value, str) else fields.python_items(value)
    if items is None:
        raise ConfigError(f"prompts={reprlib.repr(value)} must be a text or a list of texts.")
    return json.dumps([_literal(prompt) for prompt in items])


def _literal(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ConfigError(f"config.sample.prompts: {reprlib.repr(prompt)} must be a text.")
    return str(prompt)


def _dataset_records(c: ConfigDict) -> tuple[Source, np.ndarray]:
    """Returns the source that `sample.prompts` names, and the numbers of the records to use."""
    source = sources.open_source(c, c.sample.prompts.removeprefix(_DATA_PREFIX))
    return source, np.arange(min(c.sample.n, len(source)))


def names_attributes(c: ConfigDict) -> bool:
    """Returns whether the model reads captions that name attributes, which its source knows."""
    return bool(c.text.vocabulary) and c.text.caption == "caption" and bool(sources.source_class(c).attributes)


def requested_attributes(c: ConfigDict) -> np.ndarray | None:
    """Returns the attributes that the prompts name, int32 (n, A), 0 for those not named.

    Returns None if the prompts are not captions of a data set whose attributes are known.
    """
    if not names_attributes(c) or not c.sample.prompts.startswith(_DATA_PREFIX):
        return None
    source, numbers = _dataset_records(c)
    rows = source.captioned_attributes(numbers)
    return None if rows is None else rows[np.arange(c.sample.n) % len(numbers)]


def tokenize(c: ConfigDict) -> text.TokenizedTexts | None:
    """Tokenizes the prompts of all images. Returns None for a model without captions.

    Raises:
      ConfigError: See `load` and `text.encode`.
    """
    prompts = load(c)
    return text.encode(c, prompts, lambda i: "config.sample.prompts") if prompts else None


def describe(c: ConfigDict, tokens: text.TokenizedTexts | None = None) -> dict[str, Any]:
    """Returns the prompts and a hash of their tokens for a protocol; {} without captions.

    Args:
      c: The config.
      tokens: The result of `tokenize`, if it is known.
    """
    tokens = tokens or tokenize(c)
    if tokens is None:
        return {}
    return {
        "asked": c.sample.prompts,
        "prompts": load(c),
        "tokens": hashlib.sha256(b"".join(x.tobytes() for x in tokens)).hexdigest(),
    }


def add_caption_strips(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Adds a white strip with its prompt below each image. Small images are enlarged.

    Args:
      images: uint8 (n, H, W, c).
      prompts: The prompts of the images, or none.

    Returns:
      uint8 (n, H', W', 3); the images themselves if `prompts` is empty.
    """
    if not prompts:
        return images
    scale = math.ceil(_MIN_IMAGE_WIDTH / images.shape[2])
    height, width = (scale * side for side in images.shape[1:3])
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
    """Wraps a prompt into lines of at most `width` pixels. A longer word has a line of its own."""
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 4:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
