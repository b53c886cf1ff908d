"""Images for a config from the sampler: in batches, as grids, as files."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax import Array
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from madformer_jax import codec
from madformer_jax import config as config_lib
from madformer_jax.diffusion import sampler
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.models import madformer
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning
from madformer_jax.sizes import sizes_of

# ---- images for a config: in training's grids and in --mode=sample

Draw = Callable[[Any, Any, Array, Array], tuple[Array, Array]]


def make_draw(c: ConfigDict, model: MADFormer, decode: Callable[[Any, Array], Array]) -> Draw:
    """A jitted function (params, codec params, image numbers (b,), labels (b,)) -> (images (b, H, W, c), latents (b, h, w, C)).

    The noise of an image depends on the seed and its number alone: not on the batch or the process that draws it.
    """
    sizes, settings = sizes_of(c), c.sample
    given = _given_noise(c)

    @jax.jit
    def draw(params: Any, codec_params: Any, numbers: Array, labels: Array) -> tuple[Array, Array]:
        key = jax.random.key(c.seed)
        if given is None:
            noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), sizes.block_shape))(numbers)
        else:
            noise = jnp.asarray(given)[numbers]
        blocks = sampler.sample(
            model,
            params,
            noise,
            labels[:, None] if model.classes else None,
            solver=settings.solver,
            spacing=settings.spacing,
            steps=settings.steps,
            guidance=settings.guidance,
            clip=settings.clip,
        )
        z = codec.from_blocks(blocks, sizes)
        return decode(codec_params, z), z

    return draw


def _given_noise(c: ConfigDict) -> np.ndarray | None:
    path, shape = c.sample.noise, (c.sample.n, *sizes_of(c).block_shape)
    if not path:
        return None
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"config.sample.noise={path} cannot be read: {first_line(error)}.") from None
    if noise.shape != shape:
        raise ConfigError(
            f"config.sample.noise={path} is of shape {noise.shape}: it must be {shape} (n, L, positions, C)."
        )
    return noise.astype(np.float32)


def draw_all(
    c: ConfigDict, n: int, draw: Draw, params: Any, codec_params: Any, mesh: jax.sharding.Mesh, *, progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first n of the config's samples in batches of one shape, as uint8 (n, H, W, c), latents (n, h, w, C) and labels (n,).

    Every process takes part in every batch and gets all images.

    Raises:
      ConfigError: a latent or a pixel is not finite; the images and the block are named.
    """
    parts = partitioning.batch_devices(mesh)
    batch = math.ceil(min(c.sample.batch, n) / parts) * parts
    labels = np.array(config_lib.labels(c)[:n] or [0] * n, np.int32)
    sharding = partitioning.batch_sharding(mesh)
    images, latents = [], []
    for first in tqdm(range(0, n, batch), desc="sampling", unit="batch", disable=not progress):
        numbers = np.minimum(np.arange(first, first + batch), n - 1)  # the last batch is filled up and cut
        given = (jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in (numbers, labels[numbers]))
        pixels, z = partitioning.to_host(draw(params, codec_params, *given), mesh)
        kept = min(batch, n - first)
        pixels, z = pixels[:kept], z[:kept]
        _check_finite(c, pixels, z, first)
        images.append(np.round(np.clip(pixels * 127.5 + 127.5, 0, 255)).astype(np.uint8))
        latents.append(z)
    return np.concatenate(images), np.concatenate(latents), labels


def _check_finite(c: ConfigDict, pixels: np.ndarray, z: np.ndarray, first: int) -> None:
    if np.isfinite(pixels).all() and np.isfinite(z).all():
        return
    blocks = np.asarray(codec.to_blocks(z, sizes_of(c)))
    bad = np.argwhere(~np.isfinite(blocks).all(axis=(2, 3)))
    where = f"image {first + bad[0][0]} from block {bad[0][1] + 1} on" if len(bad) else "the decoder's pixels"
    raise ConfigError(
        f"sampling gave values that are not finite: {where}. The weights may have diverged (try an earlier checkpoint), or "
        f"sample.guidance={c.sample.guidance} with sample.clip={c.sample.clip} is too strong."
    )


def as_grid(images: np.ndarray) -> np.ndarray:
    """uint8 images (n, H, W, c) side by side, as many in a row as make it about square: (rows H, columns W, c)."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * columns, height, width, channels), 255, np.uint8)
    canvas[:n] = images
    return (
        canvas.reshape(rows, columns, height, width, channels)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * height, columns * width, channels)
    )


def write_png(path: epath.Path, image: np.ndarray) -> None:
    """Writes uint8 (H, W, 1 or 3) so that the file is whole or not there."""
    part = path.parent / f".{path.name}.part"
    with part.open("wb") as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
    part.replace(path)


def grid(
    c: ConfigDict, draw: Draw, params: Any, codec_params: Any, mesh: jax.sharding.Mesh, workdir: str, step: int
) -> np.ndarray:
    """Draws one batch of the config's samples with `params`, writes workdir/samples/step_..._{ema,raw}.png, and returns them.

    Returns:
      The grid, uint8 (1, H, W, c).
    """
    images, _, _ = draw_all(c, min(c.sample.n, c.sample.batch), draw, params, codec_params, mesh, progress=False)
    canvas = as_grid(images)
    path = epath.Path(workdir) / "samples" / f"step_{step:06d}_{c.sample.weights}.png"
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, canvas)
        logging.info("drew %d samples with the %s weights: %s", len(images), c.sample.weights, path)
    return canvas[None]


def abstract_params(model: MADFormer, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and shardings of the model's parameters: the target of a restore.

    Raises:
      ConfigError: the mesh does not split the layers evenly.
    """
    partitioning.check_tensor(mesh, model.heads, model.mlp_width)
    key = jax.random.key(0)  # out here: the mesh may be one to compile for, on which nothing runs
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(functools.partial(madformer.init, model), key)
    return partitioning.abstract(nn.meta.unbox(boxed), partitioning.shardings(boxed, mesh))
