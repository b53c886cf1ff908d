"""The preprocessing table: what happens to an image between its file and the model.

| step | what | why |
|---|---|---|
| decode | Pillow, whole image, first frame, EXIF orientation applied | no JPEG draft mode: same pixels for any size |
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
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from madformer_jax.data import metadata
from madformer_jax.errors import ConfigError

# Pillow warns of odd metadata, two lines each time; an image is read or refused all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")

_PIL_MODES = {1: "L", 3: "RGB"}
CHANNELS = tuple(_PIL_MODES)  # that images can have
MAX_PIXELS = 179_000_000  # about what Pillow decodes by default: 0.7 GB as RGB


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message says why."""


class Preprocessor(NamedTuple):
    """The table's settings."""

    size: int
    channels: int  # 1: grey, 3: RGB
    crop: bool
    background: str = "#ffffff"
    max_pixels: int = MAX_PIXELS  # of a file; more is refused before anything is decoded

    def pixels(self, image: bytes | np.ndarray) -> np.ndarray:
        """Decodes, crops and resizes one image.

        Args:
          image: an encoded file, or uint8 (H, W, 1 or 3).

        Returns:
          uint8 (size, size, channels).

        Raises:
          CorruptImageError: the file cannot be decoded, or has more than `max_pixels` pixels.
        """
        if isinstance(image, np.ndarray) and image.shape == (self.size, self.size, self.channels):
            return image
        try:
            if isinstance(image, np.ndarray):
                decoded, turn = to_pil(image), None
            else:
                decoded, turn = _decode(image, self.max_pixels)
            decoded = _flatten_alpha(_to_eight_bits(decoded), self.background)
            decoded = self._resize(decoded if turn is None else decoded.transpose(turn))
        except (MemoryError, CorruptImageError):  # a lack of memory is the machine's fault
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
        mode = _PIL_MODES[self.channels]
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
        """The table as JSON, for manifests and for the protocol of a score. The limit on pixels changes no pixel."""
        settings = self._asdict()
        del settings["max_pixels"]
        return {**settings, "resize": "pillow-bicubic"}


def to_pil(image: np.ndarray) -> Image.Image:
    """Of uint8 (H, W, 1 or 3)."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _decode(content: bytes, max_pixels: int) -> tuple[Image.Image, Image.Transpose | None]:
    """Decodes a file and reads how to turn it upright.

    Raises:
      CorruptImageError: The image has more than `max_pixels` pixels.
      Exception: Pillow cannot decode the file. It raises almost any type.
    """
    failure: Exception | None = None
    for readable in metadata.stripped_variants(content):
        try:
            image = _open(readable, max_pixels)
            image.load()
            return image, metadata.upright_transpose(image)
        except (MemoryError, CorruptImageError):
            raise
        except Image.DecompressionBombError as error:
            raise CorruptImageError(f"{str(error).rstrip('.')}; see config.data.max_pixels.") from None
        except Exception as error:
            failure = error  # the last one is about the pixels alone
    assert failure is not None
    raise failure


def _open(content: bytes, max_pixels: int) -> Image.Image:
    # Pillow's own limit stays as a second guard, for frames and tiles. Its warning starts where ours refuses.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    image = Image.open(io.BytesIO(content))  # reads the header only
    width, height = image.size
    if width * height > max_pixels:
        raise CorruptImageError(
            f"{width} x {height} pixels are more than config.data.max_pixels={max_pixels}. Raise it, or shrink the image."
        )
    return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits as 8 bits; other images as they are."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:  # one value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _flatten_alpha(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas


def hex_color(text: str) -> str:
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
