"""Images for a config from the sampler: in batches, as grids, as files."""

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
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import preprocess
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.diffusion import guidance, sampler, schedule
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.models import madformer
from madformer_jax.models.inference_params import inference_params
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning, storage
from madformer_jax.runtime.memory import device_capacity
from madformer_jax.sampling import codec, prompts

# ---- images for a config: in training's grids, in --mode=sample and in evaluation

# What the seed's key is folded with for images, before their number. Training folds the key with its step, below 2^31.
SAMPLE_STREAM = 1 << 31


class Inputs(NamedTuple):
    """What one batch is drawn from: arguments of the program, so that none of their values compiles it anew."""

    numbers: Array  # (b,) int32, of the images
    labels: Any  # (b,) int32; 0 for a model without classes
    noise: Array | None  # (b, L, positions, C), or None for the seed's
    seed: Any  # () uint32
    guidance: Any  # (steps,) float32; not read where the config says 1, which runs no second branch
    text: TokenizedTexts | None = None  # (b, T) and (b,), the prompts of a model that reads captions


class SampleConditions(NamedTuple):
    """What the config says of each of its `sample.n` images. Reading it takes minutes where they are many: read it once."""

    labels: np.ndarray  # (n,) int32; 0 for a model without classes
    noise: np.ndarray | None  # (n, L, positions, C), left on disk; None where the seed gives the noise
    texts: TokenizedTexts | None  # (n, T) and (n,); None for a model without captions


class SampleBatch(NamedTuple):
    """Finished images, on the host."""

    numbers: np.ndarray  # (b,) int64
    labels: np.ndarray  # (b,) int32; 0 for a model without classes
    images: np.ndarray  # (b, H, W, c) uint8
    latents: np.ndarray  # (b, h, w, C) float32


# (params, codec params, inputs) -> images uint8 (b, H, W, c), latents (b, h, w, C), whether all values are finite (b,)
SampleFn = Callable[[Any, Any, Inputs], tuple[Array, Array, Array]]


def make_sample_fn(
    c: ConfigDict, model: MADFormer, decode: Callable[[Any, Array], Array], memory: int | None = None
) -> SampleFn:
    """The jitted program that draws a batch.

    The noise of an image depends on the seed and its number alone: not on the batch or the process that draws it. `memory` is what
    a device has for it, in bytes, which decides how the parameters are held (`resident`); by default `memory.device_capacity`.
    """
    sizes, settings = derive_sizes(c), c.sample
    memory = device_capacity() if memory is None else memory

    @jax.jit
    def draw(params: Any, codec_params: Any, inputs: Inputs) -> tuple[Array, Array, Array]:
        noise = seeded_noise(inputs.seed, inputs.numbers, sizes.block_shape) if inputs.noise is None else inputs.noise
        classes = inputs.labels[:, None] if model.vocabulary else None
        tokens, lengths = inputs.text or (classes, None)
        blocks = sampler.sample(
            model,
            inference_params(model, params, memory),
            noise,
            tokens,
            lengths=lengths,
            solver=settings.solver,
            spacing=settings.spacing,
            steps=settings.steps,
            guidance=1.0 if settings.guidance == 1.0 else jnp.asarray(inputs.guidance),
            clip=settings.clip_x0,
        )
        z = codec.from_blocks(blocks, sizes)
        with jax.named_scope("codec"):
            pixels = decode(codec_params, z)
        finite = jnp.isfinite(pixels).all((1, 2, 3)) & jnp.isfinite(z).all((1, 2, 3))
        return to_uint8(pixels), z, finite

    return draw


def seeded_noise(seed: Any, numbers: Array, shape: tuple[int, ...]) -> Array:
    """The noise (n, *shape) of the images with these numbers."""
    key = jax.random.fold_in(jax.random.key(seed), SAMPLE_STREAM)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def to_uint8(pixels: Array) -> Array:
    """Pixels in [-1, 1], any shape, as uint8."""
    return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def make_inputs(
    c: ConfigDict, numbers: Any, labels: Any, noise: Any = None, text: TokenizedTexts | None = None
) -> Inputs:
    """`Inputs` with the config's seed and guidance; the arrays may be abstract."""
    return Inputs(numbers, labels, noise, np.int64(c.seed).astype(np.uint32), guidance_scales(c), text)


def guidance_scales(c: ConfigDict) -> np.ndarray:
    """See `guidance.guidance_scales`."""
    s = c.sample
    t = schedule.solver_timesteps(s.solver, s.spacing, s.steps).t
    return guidance.guidance_scales(s.guidance, s.guidance_schedule, s.guidance_interval, t)


def batch_size(c: ConfigDict, mesh: jax.sharding.Mesh, most: int | None = None) -> int:
    """Images that one run of the program draws: `most`, by default the config's batch, as a multiple of the mesh's parts."""
    parts = partitioning.batch_devices(mesh)
    return math.ceil(min(c.sample.batch, most or c.sample.n) / parts) * parts


def batches(
    c: ConfigDict,
    draw: SampleFn,
    params: Any,
    codec_params: Any,
    mesh: jax.sharding.Mesh,
    numbers: Sequence[int] | np.ndarray,
    most: int | None = None,
    given: SampleConditions | None = None,
) -> Iterator[SampleBatch]:
    """Draws the images with these numbers, below `sample.n`, in batches of one compiled shape; nothing is kept.

    Every process gives the same numbers, takes part in every batch and gets all of it. A batch holds `most` images where that is
    given and less than the config's `sample.batch`. Whoever calls this several times for a config reads `given_by` once.

    Raises:
      ConfigError: at once, if the given noise or a prompt does not fit; and where a latent or a pixel is not finite, with image
        and block.
    """
    size, sharding = batch_size(c, mesh, most), partitioning.batch_sharding(mesh)
    labels, noise, texts = given or read_conditions(c)

    def spread(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    def run(chosen: np.ndarray) -> SampleBatch:
        filled = np.pad(chosen, (0, size - len(chosen)), mode="edge")  # one shape; what fills it up is cut off again
        rows = None if noise is None else spread(np.asarray(noise[filled], np.float32))
        words = None if texts is None else TokenizedTexts(*(spread(x[filled]) for x in texts))
        inputs = make_inputs(c, spread(filled.astype(np.int32)), spread(labels[filled]), rows, words)
        images, z, finite = (x[: len(chosen)] for x in partitioning.to_host(draw(params, codec_params, inputs), mesh))
        if not finite.all():
            raise ConfigError(_non_finite_message(c, chosen, z, finite))
        return SampleBatch(chosen, labels[chosen], images, z)

    return (run(np.asarray(numbers[at : at + size], np.int64)) for at in range(0, len(numbers), size))


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
    """Reads what the config says of each of its images.

    Raises:
      ConfigError: A label, the given noise or a prompt does not fit.
    """
    return SampleConditions(read_labels(c), open_noise(c), prompts.tokenize(c))


def read_labels(c: ConfigDict) -> np.ndarray:
    """The class of each image, int32 (n,); 0 for a model without classes."""
    return np.array(config_lib.sample_labels(c) or [0] * c.sample.n, np.int32)


def open_noise(c: ConfigDict) -> np.ndarray | None:
    """The file `sample.noise`, left on disk; None where the seed gives the noise.

    Raises:
      ConfigError: it is no .npy file of finite floats (n, L, positions, C).
    """
    path, shape = c.sample.noise, (c.sample.n, *derive_sizes(c).block_shape)
    if not path:
        return None
    try:
        noise = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"config.sample.noise={path} cannot be read: {first_line(error)}.") from None
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        kind = noise.dtype if isinstance(noise, np.ndarray) else "several arrays"
        raise ConfigError(f"config.sample.noise={path} holds {kind}: it must be a .npy file of floats.")
    if noise.shape != shape:
        raise ConfigError(
            f"config.sample.noise={path} is of shape {noise.shape}: it must be {shape} (n, L, positions, C)."
        )
    for number, rows in enumerate(noise):
        if not np.isfinite(rows).all():
            raise ConfigError(f"config.sample.noise={path} is not finite at image {number}.")
    return noise


def config_noise_digest(c: ConfigDict) -> str | None:
    """The SHA-256 of the values in `sample.noise`, for a protocol; None where the seed gives the noise.

    Raises:
      ConfigError: as `given_noise`.
    """
    return hash_noise(open_noise(c))


def hash_noise(noise: np.ndarray | None) -> str | None:
    """The SHA-256 of noise as float32; None for None."""
    if noise is None:
        return None
    digest = hashlib.sha256()
    for rows in noise:
        digest.update(rows.astype(np.float32).tobytes())
    return digest.hexdigest()


# ---- files: shards of finished images, and grids


class DamagedError(Exception):
    """A file is not what was written."""


def write_shard(path: storage.Path, drawn: SampleBatch) -> None:
    """Writes images as an .npz archive of the four arrays."""
    storage.write(path, lambda file: np.savez(file, **drawn._asdict()))


def read_shard(path: storage.Path) -> SampleBatch | None:
    """What `write_shard` wrote, every byte of it checked; None where there is no file.

    Raises:
      DamagedError: the file is not whole.
    """
    try:
        content = storage.retry(epath.Path(path).read_bytes)
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return SampleBatch(**{name: file[name] for name in file.files})
    except Exception as error:  # numpy and zipfile each raise many kinds
        raise DamagedError(f"{path} is damaged ({first_line(error)})") from None


def read_shards(folder: storage.Path) -> Iterator[SampleBatch]:
    """The images of a folder that --mode=sample has written, shard by shard.

    Raises:
      ConfigError: shards are missing or damaged.
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
    """uint8 images (n, H, W, c) side by side, as many in a row as make it about square: (rows H, columns W, c)."""
    columns = math.ceil(math.sqrt(len(images)))
    empty = -len(images) % columns
    filled = np.pad(images, ((0, empty), (0, 0), (0, 0), (0, 0)), constant_values=255)
    return rearrange(filled, "(row column) h w c -> (row h) (column w) c", column=columns)


def downscale_for_grid(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 images (n, H, W, c), each averaged over squares of k x k pixels, k the least with which `as_grid` of them is at most
    `side` pixels wide and high: (n, ceil(H / k), ceil(W / k), c).
    """
    k = math.ceil(max(images.shape[1:3]) / max(1, side // math.ceil(math.sqrt(len(images)))))
    if k == 1:
        return images
    small = np.stack([np.asarray(preprocess.to_pil(image).reduce(k)) for image in images])
    return small.reshape(*small.shape[:3], images.shape[3])


def tile_rows(images: np.ndarray) -> np.ndarray:
    """uint8 images (rows, columns, H, W, c) side by side: (rows H, columns W, c)."""
    return rearrange(images, "row column h w c -> (row h) (column w) c")


def write_png(path: storage.Path, image: np.ndarray) -> None:
    """Writes uint8 (H, W, 1 or 3) so that the file is whole or not there."""
    storage.write(path, lambda file: preprocess.to_pil(image).save(file, format="png"))


def abstract_params(model: MADFormer, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and shardings of the model's parameters: the target of a restore.

    Raises:
      ConfigError: the mesh does not split the layers evenly.
    """
    partitioning.check_tensor(mesh, model.heads, model.mlp_width)
    key = jax.random.key(0)  # out here: the mesh may be one to compile for, on which nothing runs
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(functools.partial(madformer.init, model), key)
    return partitioning.abstract_arrays(nn.meta.unbox(boxed), partitioning.shardings(boxed, mesh))
