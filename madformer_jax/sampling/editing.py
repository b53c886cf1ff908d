"""Editing: some blocks of a picture are kept and the others are drawn.

The kept blocks are the first of the generation order. Sampling encodes them, caches them as clean
blocks and draws the others (`sampler.sample`). A model of random order can keep any blocks. A model
of fixed order can keep the first blocks of its order. `modes.sample` and `trained_model` call
`read_edit` and `encode`. `generation` passes `sampler_arguments` to the sampler.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config import fields
from madformer_jax.config.block_orders import fixed_order, parse_block_numbers, sampling_order_name
from madformer_jax.config.shapes import Sizes, derive_sizes
from madformer_jax.data import pipeline, preprocess
from madformer_jax.errors import ConfigError
from madformer_jax.models import block_order
from madformer_jax.runtime import storage
from madformer_jax.sampling.codec import Codec, to_blocks

_WHITE = 128  # smallest gray value that counts as white


class Edit(NamedTuple):
    """Pictures to edit, preprocessed as in training, and the numbers of the blocks to keep."""

    pictures: np.ndarray  # (m, H, W, c) uint8
    kept_numbers: np.ndarray  # (K,) int32, in the order in which the blocks are cached


class KeptBlocks(NamedTuple):
    """Clean blocks that sampling keeps."""

    numbers: Any  # (K,) int32
    blocks: Any  # (m, K, positions, C) float32, of m pictures; in a batch of b images m = b

    def of_images(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the blocks (b, K, positions, C) of images by their numbers. Images take the pictures in turn."""
        blocks: np.ndarray = self.blocks[numbers % len(self.blocks)]
        return blocks


def read_edit(c: ConfigDict, image: Any = None, mask: Any = None) -> Edit | None:
    """Reads the picture and the mask of an edit.

    Args:
      c: A validated config.
      image: A file, or uint8 pixels (H, W, c) or (m, H, W, c). By default `sample.image`.
      mask: A file, an array (H, W) that is true or white where pixels are kept, or block numbers. By
        default `sample.keep`.

    Returns:
      The edit, or None if neither is given.

    Raises:
      ConfigError: A file cannot be read, a size is wrong, or the model cannot keep these blocks.
    """
    from_config = image is None and mask is None
    image_name, mask_name = ("config.sample.image", "config.sample.keep") if from_config else ("image", "mask")
    image, mask = c.sample.image if image is None else image, c.sample.keep if mask is None else mask
    has_image, has_mask = (not isinstance(x, str) or bool(x) for x in (image, mask))
    if not has_image and not has_mask:
        return None
    if not has_image or not has_mask:
        present, missing = (image_name, mask_name) if has_image else (mask_name, image_name)
        raise ConfigError(f"{present} needs {missing}: an edit needs a picture and the blocks to keep.")
    _check_model(c, image_name)
    images, file_size = _read_images(c, image, image_name)
    return Edit(images, _check_blocks(c, _kept_numbers(c, mask, file_size, mask_name), mask_name))


def encode(edit: Edit, codec: Codec, codec_params: Any, sizes: Sizes) -> KeptBlocks:
    """Encodes the kept blocks. The latents of a picture do not depend on the seed."""
    z = jax.jit(codec.encode)(codec_params, {"image": edit.pictures}, jax.random.key(0))
    return KeptBlocks(edit.kept_numbers, np.asarray(to_blocks(z, sizes), np.float32)[:, edit.kept_numbers])


def sampler_arguments(c: ConfigDict, keys: Array, kept_blocks: KeptBlocks | None) -> dict[str, Any]:
    """Returns the arguments `order` and `kept_blocks` of `sampler.sample`.

    Args:
      c: The config.
      keys: Random key of each image.
      kept_blocks: The kept blocks of each image, which become the first of its order.
    """
    sizes = derive_sizes(c)
    order = block_order.image_orders(sampling_order_name(c), sizes, keys)
    if c.model.block_order == "random":
        order = jnp.arange(sizes.blocks) if order is None else order
        if kept_blocks is not None:  # a fixed order already begins with the kept blocks
            order = block_order.move_to_front(order, jnp.asarray(kept_blocks.numbers))
    return {"order": order, "kept_blocks": None if kept_blocks is None else kept_blocks.blocks}


def describe(edit: Edit | None) -> dict[str, Any]:
    """Returns the edit for a protocol; empty without one."""
    if edit is None:
        return {}
    digest = hashlib.sha256(repr(edit.pictures.shape).encode() + edit.pictures.tobytes()).hexdigest()
    return {"edit": {"image": digest, "keep": edit.kept_numbers.tolist()}}


def _check_model(c: ConfigDict, name: str) -> None:
    if c.codec.name == "external":
        raise ConfigError(f"{name} needs a codec that encodes images: config.codec.name='external' does not.")
    if not c.model.clean_stream:
        raise ConfigError(f"{name} needs a model with config.model.clean_stream=True, which caches clean blocks.")
    if c.model.blocks == 1:
        raise ConfigError(f"{name}: a model with config.model.blocks=1 has no block to keep beside one to draw.")


def _check_blocks(c: ConfigDict, numbers: Sequence[int], name: str) -> np.ndarray:
    """Returns the numbers of kept blocks in the order in which they are cached.

    Raises:
      ConfigError: All blocks or none are kept, or the model does not generate the others after them.
    """
    sizes, count = derive_sizes(c), len(numbers)
    if not 0 < count < sizes.blocks:
        problem = "all blocks, and none is left to draw" if count else "no block: a block is kept if all of it is white"
        raise ConfigError(f"{name} keeps {problem}. The image has {sizes.grid} x {sizes.columns} blocks.")
    model_order = fixed_order(c.model.block_order, sizes)
    if model_order is None:
        return np.sort(np.array(numbers, np.int32))
    if set(model_order[:count].tolist()) != set(numbers):
        first = ",".join(map(str, model_order[: sizes.blocks - 1]))
        raise ConfigError(
            f"{name} keeps the blocks {','.join(map(str, sorted(numbers)))}, but the model's order "
            f"config.model.block_order={c.model.block_order!r} allows only the beginning of {first}. Train with "
            "config.model.block_order=random to keep any blocks."
        )
    return model_order[:count].astype(np.int32)


def _read_images(c: ConfigDict, image: Any, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns preprocessed images (m, H, W, c), and the height and width of the file or array."""
    preprocessor = pipeline.make_preprocessor(c)
    if hasattr(image, "__array__"):
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 4
            or pixels.shape[-1] not in preprocess.CHANNELS
            or not pixels.size
        ):
            raise ConfigError(
                f"image has the shape {np.shape(image)} and the type {pixels.dtype}: it must be uint8 (H, W, c) or (m, H, W, c) "
                "of 1 or 3 channels."
            )
        return preprocessor.process_batch(pixels), pixels.shape[1:3]
    content = _read_file(name, image)
    try:
        return preprocessor.process(content)[None], preprocess.decoded_size(content, c.data.max_pixels)
    except preprocess.CorruptImageError as error:
        raise ConfigError(f"{name}={image} cannot be decoded: {error}.") from None


def _kept_numbers(c: ConfigDict, mask: Any, file_size: tuple[int, int], name: str) -> list[int]:
    """Returns the numbers of the blocks that a mask keeps.

    Args:
      c: The config.
      mask: See `read_edit`.
      file_size: Height and width of the picture's file, which a mask may have instead of the model's.
      name: What errors call the mask.
    """
    blocks = derive_sizes(c).blocks
    if isinstance(mask, str) and re.fullmatch(r"[\d\s,]+", mask):
        return parse_block_numbers(f"{name}={mask!r}", mask, blocks)
    if hasattr(mask, "__array__") and np.ndim(mask) >= 2:
        gray = np.asarray(mask)
        gray = gray.astype(np.uint8) * 255 if gray.dtype == bool else gray
        gray = gray[..., None] if gray.ndim == 2 else gray
        if gray.dtype != np.uint8 or gray.ndim != 3 or gray.shape[-1] not in preprocess.CHANNELS:
            raise ConfigError(
                f"mask has the shape {np.shape(mask)} and the type {gray.dtype}: it must be bool or uint8 (H, W)."
            )
        return _white_blocks(c, gray, gray.shape[:2], file_size, name)
    if not isinstance(mask, str) and (numbers := fields.python_items(mask)) is not None:
        text = ",".join(map(str, numbers))
        return parse_block_numbers(f"{name}={text}", text, blocks) if numbers else []
    content = _read_file(name, mask)
    try:
        return _white_blocks(c, content, preprocess.decoded_size(content, c.data.max_pixels), file_size, name)
    except preprocess.CorruptImageError as error:
        raise ConfigError(f"{name}={mask} cannot be decoded: {error}.") from None


def _white_blocks(
    c: ConfigDict, mask: bytes | np.ndarray, size: tuple[int, int], file_size: tuple[int, int], name: str
) -> list[int]:
    """Returns the numbers of the blocks that are all white in a mask. The mask is cropped and resized as the picture.

    Raises:
      ConfigError: The mask has neither the model's size nor the size of the picture.
    """
    side, sizes = c.data.image_size, derive_sizes(c)
    if size not in ((side, side), file_size):
        allowed = " or ".join(f"{width} x {height}" for height, width in dict.fromkeys([(side, side), file_size]))
        raise ConfigError(f"{name}: the mask has {size[1]} x {size[0]} pixels: it must have {allowed}, as the picture.")
    gray = pipeline.make_preprocessor(c)._replace(channels=1).process(mask)[..., 0]
    white = rearrange(gray >= _WHITE, "(i p) (j q) -> (i j) (p q)", i=sizes.grid, j=sizes.columns).all(axis=1)
    numbers: list[int] = np.flatnonzero(white).tolist()
    return numbers


def _read_file(name: str, path: Any) -> bytes:
    try:
        with storage.wrap_errors(f"{name}={path} cannot be read"):
            content: bytes = storage.retry(epath.Path(storage.expand(path)).read_bytes)
            return content
    except TypeError:
        raise ConfigError(f"{name}={path!r} must be a file or an array.") from None
