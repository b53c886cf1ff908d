"""Preprocessing of images, from the encoded file to the input of the model.

Training, evaluation and `--mode=prepare` all preprocess images here. Add a step to
`Preprocessor.process` and, if it changes pixels, to `Preprocessor.describe`.

| step | operation | reason |
|---|---|---|
| decode | Pillow, first frame, EXIF orientation, no draft mode | same pixels for any size |
| 8 bits | 16-bit gray / 257; upper byte of 16-bit color (Pillow) | white stays white |
| color | composite over `background`, convert to RGB or gray | colors under alpha 0 are arbitrary |
| crop | largest centered square; `crop=False` squeezes instead | |
| resize | to size x size, bicubic, antialiased | as FID protocols; LANCZOS takes 1.5x and rings |
| flip | left-right with probability 1/2, if enabled | by `pipeline`, from (seed, position) |
| range | uint8 -> float32, x / 127.5 - 1: [-1, 1] | by `codec.to_float` on the device |
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from madformer_jax.data import metadata
from madformer_jax.errors import ConfigError, first_line

# Pillow warns about odd metadata. The warnings do not matter: an image is either read or refused.
warnings.filterwarnings("ignore", module=r"PIL\.")

_PIL_MODES = {1: "L", 3: "RGB"}
CHANNELS = tuple(_PIL_MODES)  # supported numbers of channels
MAX_PIXELS = 179_000_000  # about Pillow's default limit: 0.7 GB as RGB


class CorruptImageError(ValueError):
    """Error for an image that cannot be decoded. The message says why."""


def load_array(path: str, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Loads a .npy file, or maps it into memory.

    Raises:
      CorruptImageError: It is damaged, or a .npz archive.
      OSError: It cannot be read.
    """
    try:
        array = np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged header raises many types, such as tokenize.TokenError
        raise CorruptImageError(first_line(error)) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise CorruptImageError("it is a .npz archive of several arrays")
    return array


def read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the shape, the Fortran order and the type of an array from the start of a .npy file.

    Raises:
      Exception: The header is damaged. NumPy raises many types.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class Preprocessor(NamedTuple):
    """Settings of the preprocessing, and the functions that apply it."""

    size: int
    channels: int  # 1: gray, 3: RGB
    crop: bool
    background: str = "#ffffff"
    max_pixels: int = MAX_PIXELS  # larger files are refused before decoding

    def process(self, image: bytes | np.ndarray) -> np.ndarray:
        """Decodes, crops and resizes one image.

        Args:
          image: An encoded file, or uint8 (H, W, 1 or 3).

        Returns:
          uint8 (size, size, channels).

        Raises:
          CorruptImageError: The file cannot be decoded, or has more than `max_pixels` pixels.
        """
        if isinstance(image, np.ndarray) and image.shape == (self.size, self.size, self.channels):
            return image
        try:
            if isinstance(image, np.ndarray):
                decoded, transpose = to_pil(image), None
            else:
                decoded, transpose = _decode(image, self.max_pixels)
            decoded = _flatten_alpha(_to_eight_bits(decoded), self.background)
            decoded = self._resize(decoded if transpose is None else decoded.transpose(transpose))
        except (MemoryError, CorruptImageError):  # a lack of memory does not make the image corrupt
            raise
        except Exception as error:  # corrupt files raise many types, from SyntaxError to struct.error
            reason = re.sub(r" <_io\.BytesIO .*>", "", f"{type(error).__name__}: {error}")  # a BytesIO has no name
            raise CorruptImageError(reason) from error
        return np.asarray(decoded).reshape(self.size, self.size, self.channels)

    def process_batch(self, images: Sequence[bytes | np.ndarray] | np.ndarray) -> np.ndarray:
        """Applies `process` to b images.

        Returns:
          uint8 (b, size, size, channels); `images` itself if it already has that shape.
        """
        shape = (self.size, self.size, self.channels)
        if isinstance(images, np.ndarray) and images.shape[1:] == shape:
            return images
        out = np.empty((len(images), *shape), np.uint8)
        for i, image in enumerate(images):
            out[i] = self.process(image)
        return out

    def _resize(self, image: Image.Image) -> Image.Image:
        mode = _PIL_MODES[self.channels]
        image = image if image.mode == mode else image.convert(mode)  # `convert` always copies
        if image.size == (self.size, self.size):
            return image
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # Resizing and cropping in one pass computes only the pixels of the square.
        box = (left, top, left + side, top + side) if self.crop else None
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def describe(self) -> dict[str, Any]:
        """Returns the settings that decide the pixels, for manifests and score protocols (JSON)."""
        settings = self._asdict()
        del settings["max_pixels"]  # refuses images but changes no pixel
        return {**settings, "resize": "pillow-bicubic"}


def to_pil(image: np.ndarray) -> Image.Image:
    """Converts uint8 (H, W, 1 or 3) to a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _decode(content: bytes, max_pixels: int) -> tuple[Image.Image, Image.Transpose | None]:
    """Decodes a file. Pillow raises almost any type of error.

    Returns:
      The image as stored, and the operation that turns it upright (None if it is upright).
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
            failure = error  # the last variant has no metadata, so its error concerns the pixels
    assert failure is not None
    raise failure


def decoded_size(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns the height and width of an encoded image, upright.

    Raises:
      CorruptImageError: The file cannot be decoded.
    """
    try:
        image, transpose = _decode(content, max_pixels)
    except (MemoryError, CorruptImageError):
        raise
    except Exception as error:  # as in `Preprocessor.process`
        raise CorruptImageError(first_line(error)) from error
    width, height = (image if transpose is None else image.transpose(transpose)).size
    return height, width


def _open(content: bytes, max_pixels: int) -> Image.Image:
    # Pillow's own limit also guards frames and tiles. It must not be below `max_pixels`.
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
    """Converts gray images of more than 8 bits to 8 bits, and returns other images unchanged."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.uint32)
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:  # the gray value that is transparent
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def _flatten_alpha(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas


def hex_color(text: str) -> str:
    """Converts a color in any notation of Pillow ("white", "#fff", "#ffffff") to "#rrggbb".

    Raises:
      ConfigError: `text` is not an opaque color.
    """
    try:
        rgb: tuple[int, ...] = ImageColor.getrgb(text)
    except ValueError:
        rgb = ()
    if len(rgb) != 3:
        raise ConfigError(f'config.data.background={text!r} is not a color: give "#rrggbb", or a name like "white".')
    return "#{:02x}{:02x}{:02x}".format(*rgb)
