"""The preprocessing table: what happens to an image between its file and the model.

| step | what | why |
|---|---|---|
| decode | Pillow, whole image, EXIF orientation applied | no JPEG draft mode: same pixels for any size |
| 8 bits | 16-bit grey is divided by 257; 16-bit colour keeps its upper byte (Pillow's reading) | white stays white |
| colour | what is transparent shows `background`; then converted to RGB or grey | colours under alpha 0 are anybody's |
| crop | the largest centred square, or none (`crop=False`: the image is squeezed) | |
| resize | to size x size, bicubic, antialiased | what FID protocols use; LANCZOS costs 1.5 times as much and rings |
| flip | left-right with probability 1/2, if asked for | drawn by the pipeline from (seed, position) |
| range | uint8 -> float32, x / 127.5 - 1: [-1, 1] | on the device (`codec.to_float`): a quarter of the bytes go there |

Training, reference statistics and `--mode=prepare` all go through this module.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from madformer_jax.errors import ConfigError

_MODES = {1: "L", 3: "RGB"}
CHANNELS = tuple(_MODES)  # that images can have


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message says why."""


class Table(NamedTuple):
    """The table's settings."""

    size: int
    channels: int  # 1: grey, 3: RGB
    crop: bool
    background: str = "#ffffff"

    def pixels(self, image: bytes | np.ndarray) -> np.ndarray:
        """Decodes, crops and resizes one image.

        Args:
          image: an encoded file, or uint8 (H, W, 1 or 3).

        Returns:
          uint8 (size, size, channels).

        Raises:
          CorruptImageError: the file cannot be decoded.
        """
        if isinstance(image, np.ndarray) and image.shape == (self.size, self.size, self.channels):
            return image
        try:
            decoded = self._resize(_opaque(_eight_bits(_open(image)), self.background))
        except MemoryError:  # the machine's fault
            raise
        except Exception as error:  # corrupt files raise about every type there is, from SyntaxError to struct.error
            reason = re.sub(r" <_io\.BytesIO .*>", "", f"{type(error).__name__}: {error}")  # our file has no name
            raise CorruptImageError(reason) from error
        return np.asarray(decoded).reshape(self.size, self.size, self.channels)

    def batch(self, images: Sequence[bytes | np.ndarray] | np.ndarray) -> np.ndarray:
        """`pixels` of each, uint8 (b, size, size, channels); an array that is so already is returned itself."""
        shape = (self.size, self.size, self.channels)
        if isinstance(images, np.ndarray) and images.shape[1:] == shape:
            return images
        out = np.empty((len(images), *shape), np.uint8)
        for i, image in enumerate(images):
            out[i] = self.pixels(image)
        return out

    def _resize(self, image: Image.Image) -> Image.Image:
        mode = _MODES[self.channels]
        image = image if image.mode == mode else image.convert(mode)  # Pillow copies even where nothing changes
        if image.size == (self.size, self.size):
            return image
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # resize and crop in one pass: only what the square needs is computed
        box = (left, top, left + side, top + side) if self.crop else None
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def describe(self) -> dict[str, Any]:
        """The table as JSON, for manifests and for the protocol of a score."""
        return {**self._asdict(), "resize": "pillow-bicubic"}


def picture(image: np.ndarray) -> Image.Image:
    """Of uint8 (H, W, 1 or 3)."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _open(image: bytes | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        return picture(image)
    decoded: Image.Image = Image.open(io.BytesIO(image))
    ImageOps.exif_transpose(decoded, in_place=True)
    return decoded


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits as 8 bits; other images as they are."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:  # one value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _opaque(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas


def colour(text: str) -> str:
    """A colour as Pillow knows it ("white", "#fff", "#ffffff") in the last form.

    Raises:
      ConfigError: it is none.
    """
    try:
        rgb: tuple[int, ...] = ImageColor.getrgb(text)
    except ValueError:
        rgb = ()
    if len(rgb) != 3:
        raise ConfigError(f'config.data.background={text!r} is no colour: give "#rrggbb", or a name like "white".')
    return "#{:02x}{:02x}{:02x}".format(*rgb)
