"""Held-out images and their noise, the same for every model.

The images are the first n of a fixed random order of `evaluate.split`. Noise depends on the number of the
image and on the number of the draw alone, and is drawn in the layout of the latent. Models of one image size
and codec therefore see the same noise, whatever their blocks and seeds, and differences between them are
paired. `teacher_forcing` evaluates a model on the batches, in the order in which it generates its blocks.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config.block_orders import sampling_order_name
from madformer_jax.config.shapes import Sizes, derive_sizes
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.models import block_order
from madformer_jax.models.block_order import Order
from madformer_jax.runtime import partitioning
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import codec, generation
from madformer_jax.sampling.opening import TrainedModel

SEED = 2020  # of the order of the images, the noise and the timesteps
MAX_BATCH = 64
# Folded into an image's key for its latents and its order of blocks. Draws of noise are below.
_POSTERIOR_STREAM, _ORDER_STREAM = 1 << 31, (1 << 31) + 2


class HeldOutBatch(NamedTuple):
    """Held-out images on the devices. Rows from `rows` on repeat the last image."""

    rows: int
    numbers: np.ndarray  # (B,) int32, numbers of the images, on the host
    device_numbers: Array  # the same
    z: Array  # (B, L, positions, C), clean latent blocks in raster order
    tokens: Array | None  # (B, T), class or caption; None for an unconditional model
    lengths: Array | None  # (B,), number of tokens of each caption
    labels: np.ndarray  # (B,) on the host
    order: Order | None = None  # raster number of the block at each rank, (L,) or (B, L); None for raster order


class HeldOutImages:
    """The first n images of `evaluate.split` in a fixed random order.

    Attributes:
      n: Number of images.
      protocol: JSON that identifies the images and their noise.
    """

    def __init__(self, c: ConfigDict, n: int):
        """Opens the split.

        Raises:
          ConfigError: n is 1, or the split is that of training, cannot be opened, or has less than n images.
        """
        if n < 2:
            raise ConfigError(f"{n} held-out image is too few: set config.evaluate.held_out_n to at least 2 images.")
        if c.evaluate.split == c.data.split:
            raise ConfigError(
                f"config.evaluate.split={c.evaluate.split!r} is the split of training: held-out scores need another split."
            )
        self._c = c.copy_and_resolve_references()
        self._c.data.split, self._c.data.flip = c.evaluate.split, False
        try:
            info, self._read = pipeline.open_records(self._c)
        except ConfigError as error:
            raise ConfigError(f"held-out scores need config.evaluate.split={c.evaluate.split!r}: {error}") from None
        if info.records < n:
            raise ConfigError(
                f"{n} held-out images are too many: split {c.evaluate.split!r} has {info.records}. Set "
                f"config.evaluate.held_out_n to at most {info.records}."
            )
        self.n = n
        self._records = np.random.RandomState(SEED).permutation(info.records)[:n]
        self.protocol = {
            "n": n,
            "split": c.evaluate.split,
            "fingerprint": info.fingerprint,
            "image": pipeline.make_preprocessor(self._c).describe(),
            "seed": SEED,
        }

    def batches(
        self, c: ConfigDict, trained: TrainedModel, codec_params: Any, n: int | None = None
    ) -> Iterator[HeldOutBatch]:
        """Yields the first n images, by default all, in batches of one size.

        Args:
          c: The setting to evaluate, whose `sample.block_order` orders the blocks.
          trained: The model, whose codec encodes the images.
          codec_params: Parameters of the codec.
          n: Number of images.
        """
        count = self.n if n is None else min(n, self.n)
        size = generation.batch_size(self._c, trained.mesh, min(MAX_BATCH, count))
        sizes = derive_sizes(self._c)
        encode = _encoder(trained, sizes)
        for first in interruptible(range(0, count, size)):
            numbers = np.arange(first, first + size).clip(max=count - 1).astype(np.int32)
            batch = self._read(self._records[numbers])
            pixels: dict[str, np.ndarray] = {name: batch[name] for name in ("image", "mean", "logvar") if name in batch}
            arrays = shard({**pixels, "numbers": numbers}, trained.mesh)
            z = encode(codec_params, arrays)
            tokens = lengths = None
            if trained.network.config.vocabulary:
                texts = {"tokens": batch.get("tokens", batch["label"][:, None])}
                texts |= {"lengths": batch["lengths"]} if "lengths" in batch else {}
                texts = shard(texts, trained.mesh)
                tokens, lengths = texts["tokens"], texts.get("lengths")
            rows = min(size, count - first)
            order = generation_order(c, sizes, arrays["numbers"])
            yield HeldOutBatch(rows, numbers, arrays["numbers"], z, tokens, lengths, batch["label"], order)


def shard(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """Shards the rows of arrays over the devices. Every process passes the whole arrays."""
    sharding = partitioning.batch_sharding(mesh)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in arrays.items()}


def image_keys(numbers: Array, stream: int | Array) -> Array:
    """Returns a random key (B,) of each image for a stream of random numbers."""
    key = jax.random.fold_in(jax.random.key(SEED), stream)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def generation_order(c: ConfigDict, sizes: Sizes, numbers: Array) -> Order | None:
    """Returns the order of sampling: (L,), or (B, L) for an order of each image. None for the raster order of a raster model."""
    if c.model.block_order == "raster":
        return None
    order = block_order.image_orders(sampling_order_name(c), sizes, image_keys(numbers, _ORDER_STREAM))
    return np.arange(sizes.blocks) if order is None else order


def block_noise(numbers: Array, draw: int | Array, sizes: Sizes) -> Array:
    """Returns standard normal noise (B, L, positions, C) of images for a draw below 2^31."""
    shape = (sizes.latent, sizes.latent, sizes.channels)
    return codec.to_blocks(generation.keyed_noise(image_keys(numbers, draw), shape), sizes)


def _encoder(trained: TrainedModel, sizes: Sizes) -> Any:
    @jax.jit
    def encode(codec_params: Any, batch: dict[str, Array]) -> Array:
        def encode_image(row: dict[str, Array], key: Array) -> Array:
            return trained.codec.encode(codec_params, {name: x[None] for name, x in row.items()}, key)[0]

        keys = image_keys(batch["numbers"], _POSTERIOR_STREAM)
        rows = {name: x for name, x in batch.items() if name != "numbers"}
        return codec.to_blocks(jax.vmap(encode_image)(rows, keys), sizes)

    return encode
