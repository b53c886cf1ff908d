"""Images of a config: drawn in batches, joined to grids and written to files.

`modes.sample`, `modes.evaluate`, `modes.sweep`, the hooks of training and `trained_model.Model`
draw with `make_sample_fn` and `batches`.
"""

import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.config import seeds
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import preprocess
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.diffusion import sampler, schedule
from madformer_jax.diffusion.autoguidance import GuidedPair
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.models import madformer
from madformer_jax.models.inference_params import inference_params
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning, storage
from madformer_jax.runtime.memory import device_capacity
from madformer_jax.sampling import codec, editing, prompts, solving

# ---- drawing

# Folded into the key before an image number, so that images and training steps (below 2^31) never share a key.
SAMPLE_STREAM = 1 << 31


class Inputs(NamedTuple):
    """Inputs of one batch: arguments of the program, so that new values do not recompile it."""

    numbers: Array  # (b,) int32, numbers of the images
    labels: Any  # (b,) int32; 0 for a model without classes
    noise: Array | None  # (b, L, positions, C), or None for the noise of the seed
    seed: Any  # () uint32
    guidance: Any  # `solving.guidance_scales`; unused if `sample.guidance` is 1, which runs no second branch
    text: TokenizedTexts | None = None  # (b, T) and (b,), prompts for a model that reads captions
    kept_blocks: editing.KeptBlocks | None = None
    coefficients: Any = None  # `solvers.PaddedCoefficients` in place of those of the config, see `solving.pad_steps`


class SampleConditions(NamedTuple):
    """Labels, noise, prompts and kept blocks of the images of a config. Reading them can take minutes: do it once."""

    labels: np.ndarray  # (n,) int32; 0 for a model without classes
    noise: np.ndarray | None  # (n, L, positions, C), memory-mapped; None for the noise of the seed
    texts: TokenizedTexts | None  # (n, T) and (n,); None for a model without captions
    kept_blocks: editing.KeptBlocks | None = None  # None unless a picture is edited


class SampleBatch(NamedTuple):
    """Finished images on the host."""

    numbers: np.ndarray  # (b,) int64
    labels: np.ndarray  # (b,) int32; 0 for a model without classes
    images: np.ndarray  # (b, H, W, c) uint8
    latents: np.ndarray  # (b, side, side, C) float32


# (params, codec params, inputs)
# -> images uint8 (b, H, W, c), latents (b, side, side, C), finite bool (b,)
SampleFn = Callable[[Any, Any, Inputs], tuple[Array, Array, Array]]


def make_sample_fn(
    c: ConfigDict, model: MADFormer | GuidedPair, decode: Callable[[Any, Array], Array], memory: int | None = None
) -> SampleFn:
    """Returns the jitted program that draws a batch.

    The noise of an image depends on the seed and on its number alone, not on the batch or the
    process that draws it.

    Args:
      c: The config.
      model: The network, or the network with its guide. The parameters are then a pair, too.
      decode: (codec params, latents) -> pixels.
      memory: Bytes of a device, for `inference_params`. By default `device_capacity`.

    Raises:
      ConfigError: The config has a guide, and the network has none.
    """
    if c.sample.guide and c.sample.guidance != 1.0 and not isinstance(model, GuidedPair):
        raise ConfigError(f"config.sample.guide={c.sample.guide}: this mode measures one model. Leave the guide out.")
    sizes, settings, path = derive_sizes(c), c.sample, schedule.make(**c.diffusion)
    memory = device_capacity() if memory is None else memory

    @jax.jit
    def draw(params: Any, codec_params: Any, inputs: Inputs) -> tuple[Array, Array, Array]:
        keys = image_keys(inputs.seed, inputs.numbers)
        noise = keyed_noise(keys, sizes.block_shape) if inputs.noise is None else inputs.noise
        classes = inputs.labels[:, None] if model.config.vocabulary else None
        tokens, lengths = inputs.text or (classes, None)
        blocks = sampler.sample(
            model,
            sampling_params(model, params, memory),
            noise,
            tokens,
            lengths=lengths,
            keys=keys,
            **editing.sampler_arguments(c, keys, inputs.kept_blocks),
            solver=settings.solver,
            spacing=settings.spacing,
            steps=solving.solver_steps(c),
            schedule=path,
            guidance=1.0 if settings.guidance == 1.0 else jnp.asarray(inputs.guidance),
            clip_x0=settings.clip_x0,
            context_noise=settings.context_noise,
            padded=inputs.coefficients,
        )
        z = codec.from_blocks(blocks, sizes)
        with jax.named_scope("codec"):
            pixels = decode(codec_params, z)
        finite = jnp.isfinite(pixels).all((1, 2, 3)) & jnp.isfinite(z).all((1, 2, 3))
        return to_uint8(pixels), z, finite

    return draw


def sampling_params(model: MADFormer | GuidedPair, params: Any, memory: int) -> Any:
    """Returns `inference_params` of a network, or of a network and its guide, which share the memory."""
    if isinstance(model, GuidedPair):
        return tuple(inference_params(network, x, memory // 2) for network, x in zip(model, params))
    return inference_params(model, params, memory)


def image_keys(seed: Any, numbers: Array) -> Array:
    """Returns the random keys (n,) of the images with these numbers."""
    key = jax.random.fold_in(jax.random.key(seed), SAMPLE_STREAM)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)


def keyed_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Returns the initial noise (n, *shape) of images with these random keys."""
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def to_uint8(pixels: Array) -> Array:
    """Converts pixels in [-1, 1], any shape, to uint8."""
    return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def make_inputs(
    c: ConfigDict, numbers: Any, labels: Any, noise: Any = None, text: TokenizedTexts | None = None
) -> Inputs:
    """Makes `Inputs` with the seed and guidance of the config. The arrays may be abstract."""
    seed = np.int64(seeds.of(c, "sample")).astype(np.uint32)
    return Inputs(numbers, labels, noise, seed, solving.guidance_scales(c), text)


def batch_size(c: ConfigDict, mesh: jax.sharding.Mesh, max_batch: int | None = None) -> int:
    """Returns the number of images that one run of the program draws.

    It is the smaller of `sample.batch` and `max_batch` (by default `sample.n`), rounded up to a
    multiple of the devices that share a batch.
    """
    devices = partitioning.batch_devices(mesh)
    return math.ceil(min(c.sample.batch, max_batch or c.sample.n) / devices) * devices


def batches(
    c: ConfigDict,
    sample_fn: SampleFn,
    params: Any,
    codec_params: Any,
    mesh: jax.sharding.Mesh,
    numbers: Sequence[int] | np.ndarray,
    max_batch: int | None = None,
    conditions: SampleConditions | None = None,
) -> Iterator[SampleBatch]:
    """Draws images in batches of one compiled shape.

    Every process passes the same numbers, takes part in every batch and gets all of it.

    Args:
      c: The config.
      sample_fn: The program of `make_sample_fn`.
      params: The parameters of the model.
      codec_params: The parameters of the codec.
      mesh: The mesh.
      numbers: Numbers of the images, below `sample.n`.
      max_batch: See `batch_size`.
      conditions: The result of `read_conditions`, for callers that draw from a config repeatedly.

    Raises:
      ConfigError: The noise or a prompt cannot be used (raised by the call itself), or a latent or
        pixel is not finite (raised while iterating; the message names the image).
    """
    size, sharding = batch_size(c, mesh, max_batch), partitioning.batch_sharding(mesh)
    labels, noise, texts, edit = conditions or read_conditions(c)

    def shard(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    def run(chosen: np.ndarray) -> SampleBatch:
        padded = np.pad(chosen, (0, size - len(chosen)), mode="edge")
        batch_noise = None if noise is None else shard(np.asarray(noise[padded], np.float32))
        text = None if texts is None else TokenizedTexts(*(shard(x[padded]) for x in texts))
        inputs = make_inputs(c, shard(padded.astype(np.int32)), shard(labels[padded]), batch_noise, text)
        inputs = inputs._replace(kept_blocks=edit and edit._replace(blocks=shard(edit.of_images(padded))))
        outputs = partitioning.to_host(sample_fn(params, codec_params, inputs), mesh)
        images, z, finite = (x[: len(chosen)] for x in outputs)
        if not finite.all():
            raise ConfigError(_non_finite_message(c, chosen, z, finite))
        return SampleBatch(chosen, labels[chosen], images, z)

    return (run(np.asarray(numbers[i : i + size], np.int64)) for i in range(0, len(numbers), size))


def _non_finite_message(c: ConfigDict, numbers: np.ndarray, z: np.ndarray, finite: np.ndarray) -> str:
    blocks = np.asarray(codec.to_blocks(z, derive_sizes(c)))
    bad = np.argwhere(~np.isfinite(blocks).all(axis=(2, 3)))
    if len(bad):
        where = f"image {numbers[bad[0][0]]} from block {bad[0][1] + 1} on"
    else:
        where = f"the decoder's pixels of image {numbers[np.argmin(finite)]}"
    return (
        f"sampling gave values that are not finite: {where}. The weights may have diverged (try an earlier checkpoint), or "
        f"sample.guidance={c.sample.guidance} with sample.clip_x0={c.sample.clip_x0} is too strong."
    )


def read_conditions(c: ConfigDict) -> SampleConditions:
    """Reads the labels, the noise and the prompts of the images of a config.

    Raises:
      ConfigError: A label, the noise or a prompt cannot be used.
    """
    return SampleConditions(read_labels(c), open_noise(c), prompts.tokenize(c))


def read_labels(c: ConfigDict) -> np.ndarray:
    """Returns the class of each image, int32 (n,); 0 for a model without classes."""
    return np.array(config_lib.sample_labels(c) or [0] * c.sample.n, np.int32)


def open_noise(c: ConfigDict) -> np.ndarray | None:
    """Opens the file `sample.noise` as a memory map. Returns None if it is not set.

    Raises:
      ConfigError: It is not a .npy file of finite floats (n, L, positions, C).
    """
    path, shape = c.sample.noise, (c.sample.n, *derive_sizes(c).block_shape)
    if not path:
        return None
    try:
        noise = preprocess.load_array(path, mmap_mode="r")
    except (OSError, preprocess.CorruptImageError) as error:
        raise ConfigError(f"config.sample.noise={path} cannot be read as a .npy file: {first_line(error)}.") from None
    if noise.dtype.kind != "f":
        raise ConfigError(f"config.sample.noise={path} holds {noise.dtype}: it must be a .npy file of floats.")
    if noise.shape != shape:
        raise ConfigError(
            f"config.sample.noise={path} is of shape {noise.shape}: it must be {shape} (n, L, positions, C)."
        )
    for number, image_noise in enumerate(noise):
        if not np.isfinite(image_noise).all():
            raise ConfigError(f"config.sample.noise={path} is not finite at image {number}.")
    return noise


def hash_noise(noise: np.ndarray | None) -> str | None:
    """Returns the SHA-256 of noise as float32, or None for None."""
    if noise is None:
        return None
    digest = hashlib.sha256()
    for image_noise in noise:
        digest.update(image_noise.astype(np.float32).tobytes())
    return digest.hexdigest()


# ---- files


class DamagedError(Exception):
    """The content of a file is not what was written."""


def write_shard(path: storage.Path, batch: SampleBatch) -> None:
    """Writes images as an .npz archive of the four arrays."""
    storage.write(path, lambda file: np.savez(file, **batch._asdict()))


def read_shard(path: storage.Path) -> SampleBatch | None:
    """Reads and verifies a file of `write_shard`. Returns None if the file does not exist.

    Raises:
      DamagedError: The file is incomplete or changed.
    """
    try:
        content = storage.retry(epath.Path(path).read_bytes)
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return SampleBatch(**{name: file[name] for name in file.files})
    except Exception as error:  # NumPy and zipfile raise many kinds.
        raise DamagedError(f"{path} is damaged ({first_line(error)})") from None


def read_shards(folder: storage.Path) -> Iterator[SampleBatch]:
    """Reads the images of a folder that --mode=sample has written, shard by shard.

    Raises:
      ConfigError: Shards are missing or damaged.
    """
    with storage.wrap_errors(f"{folder} cannot be read"):
        paths = storage.list_matching(folder, "shard-*-of-*.npz")
    count = int(paths[0].stem.rpartition("-")[2]) if paths else 0
    if not paths or len(paths) != count:
        raise ConfigError(f"{folder} holds {len(paths)} of {count or '?'} shards: let --mode=sample finish it.")
    for path in paths:
        try:
            with storage.wrap_errors(f"{path} cannot be read"):
                shard = read_shard(path)
        except DamagedError as error:
            raise ConfigError(f"{error}: --mode=sample draws it again.") from None
        if shard is not None:
            yield shard


def tile_grid(images: np.ndarray) -> np.ndarray:
    """Joins images to an approximately square grid, which is padded with white.

    Args:
      images: uint8 (n, H, W, c).

    Returns:
      uint8 (rows H, columns W, c).
    """
    columns = math.ceil(math.sqrt(len(images)))
    empty = -len(images) % columns
    filled = np.pad(images, ((0, empty), (0, 0), (0, 0), (0, 0)), constant_values=255)
    return rearrange(filled, "(row column) h w c -> (row h) (column w) c", column=columns)


def downscale_for_grid(images: np.ndarray, side: int) -> np.ndarray:
    """Downscales images so that their `tile_grid` is at most `side` pixels wide and high.

    Each image is averaged over squares of k x k pixels, with the smallest k that suffices.

    Args:
      images: uint8 (n, H, W, c).
      side: Pixels.

    Returns:
      uint8 (n, ceil(H / k), ceil(W / k), c).
    """
    k = math.ceil(max(images.shape[1:3]) / max(1, side // math.ceil(math.sqrt(len(images)))))
    if k == 1:
        return images
    small = np.stack([np.asarray(preprocess.to_pil(image).reduce(k)) for image in images])
    return small.reshape(*small.shape[:3], images.shape[3])


def tile_rows(images: np.ndarray) -> np.ndarray:
    """Joins uint8 images (rows, columns, H, W, c) to a picture (rows H, columns W, c)."""
    return rearrange(images, "row column h w c -> (row h) (column w) c")


def write_png(path: storage.Path, image: np.ndarray) -> None:
    """Writes a picture, uint8 (H, W, 1 or 3), atomically as a PNG."""
    storage.write(path, lambda file: preprocess.to_pil(image).save(file, format="png"))


def abstract_params(model: MADFormer, mesh: jax.sharding.Mesh) -> Any:
    """Returns the shapes and shardings of the model's parameters, the target of a restore.

    Raises:
      ConfigError: The mesh does not split the layers evenly.
    """
    partitioning.check_tensor(mesh, model.config.heads, model.config.mlp_width)
    key = jax.random.key(0)  # Outside of the scope: the mesh may have no devices that can run.
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(functools.partial(madformer.init, model), key)
    return partitioning.abstract_arrays(nn.meta.unbox(boxed), partitioning.shardings(boxed, mesh))
