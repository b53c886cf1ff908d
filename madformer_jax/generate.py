"""Block-autoregressive sampling with the KV cache (MADFormer, section 4).

For block i: the AR layers once, then the diffusion layers at every solver step, then the clean tower once on the finished
block. All blocks run in one loop of one program.
"""

import functools
import json
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

from madformer_jax import checkpoint, codec, partitioning
from madformer_jax import config as config_lib
from madformer_jax.config import ConfigError
from madformer_jax.diffusion import solvers
from madformer_jax.models import attention, madformer
from madformer_jax.models.madformer import MADFormer, ModelCache


def sample(
    model: MADFormer,
    params: Any,
    noise: Array,
    tokens: Array | None = None,
    *,
    solver: str,
    spacing: str,
    steps: int,
    guidance: float = 1.0,
    clip: float = 0.0,
    unroll: bool = False,
) -> Array:
    """Latent blocks from noise, one block after the other. Pure; everything behind the star is static under jit.

    Args:
      noise: (B, L, positions, C), standard normal.
      tokens: text tokens (B, T) of a conditional model; `model.classes` means none.
      solver, spacing, steps: see `solvers.table`.
      guidance: scale w of classifier-free guidance, eps = eps_none + w (eps_tokens - eps_none); 1 runs no second branch.
      clip: bound of the predicted clean latent; 0 for none.
      unroll: one copy of the program for each block instead of a loop (for counting its cost).

    Returns:
      Latent blocks (B, L, positions, C).
    """
    table = solvers.table(solver, spacing, steps)
    clean_t = int(table.t[-1]) if model.clean_timestep == "noisy" else 0
    batch, blocks = noise.shape[:2]
    guided = tokens is not None and guidance != 1.0
    branches = 2 if guided else 1

    def call(method: str, *args: Any) -> Any:
        return model.apply({"params": params}, *args, method=method)

    def repeat(x: Array) -> Array:
        return jnp.concatenate([x] * branches)

    def eps_of(cache: ModelCache, condition: Array, x: Array, t: Any, block: int | Array) -> tuple[Array, Any]:
        eps, own = call("denoise", cache, condition, x, t, block)
        if guided:
            with_tokens, without = jnp.split(eps, 2)
            eps = without + guidance * (with_tokens - without)
        return eps, None if model.clean_stream else own

    def one_block(carry: tuple[ModelCache, Array], block: int | Array) -> tuple[tuple[ModelCache, Array], Array]:
        cache, pred = carry
        condition, cache = call("condition", cache, pred, block)
        x = jax.lax.dynamic_slice_in_dim(noise, block, 1, axis=1)

        def solver_step(state: solvers.State, row: solvers.Solver) -> tuple[solvers.State, None]:
            eps, _ = eps_of(cache, condition, state.x, row.t, block)
            return solvers.step(state, eps, row, clip), None

        rows = jax.tree.map(jnp.asarray, table)
        state = solvers.start(x)
        # The last step stands alone: its keys and values go to the cache when there is no clean stream.
        state, _ = jax.lax.scan(solver_step, state, jax.tree.map(lambda r: r[:-1], rows), unroll=steps if unroll else 1)
        last = jax.tree.map(lambda r: r[-1], rows)
        eps, own = eps_of(cache, condition, state.x, last.t, block)
        z = solvers.step(state, eps, last, clip).x

        def extend(cache: ModelCache, pred: Array) -> tuple[ModelCache, Array]:
            c = repeat(call("embed_clean", z, clean_t))
            if not model.clean_stream:
                return call("remember", cache, own, block), c
            return call("extend", cache, c, block), c

        if isinstance(block, int):
            return (extend(cache, pred) if block + 1 < blocks else carry), z
        return jax.lax.cond(block + 1 < blocks, extend, lambda *same: same, cache, pred), z

    cache = call("empty_cache", branches * batch)
    if tokens is not None:
        none = [jnp.full_like(tokens, model.classes)] if guided else []
        cache = call("read_text", cache, jnp.concatenate([tokens, *none]))
    carry = (cache, call("begin", branches * batch))
    if blocks == 1 or unroll:
        parts = []
        for block in range(blocks):
            carry, z = one_block(carry, block)
            parts.append(z)
        return jnp.concatenate(parts, axis=1)
    _, z = jax.lax.scan(one_block, carry, jnp.arange(blocks))
    return jnp.swapaxes(z[:, :, 0], 0, 1)


# ---- images for a config: in training's grids and in --mode=sample

Draw = Callable[[Any, Any, Array, Array], tuple[Array, Array]]


def make_draw(c: ConfigDict, model: MADFormer, decode: Callable[[Any, Array], Array]) -> Draw:
    """A jitted function (params, codec params, image numbers (b,), labels (b,)) -> (images (b, H, W, c), latents (b, h, w, C)).

    The noise of an image depends on the seed and its number alone: not on the batch or the process that draws it.
    """
    sizes, settings = config_lib.sizes(c), c.sample
    given = _given_noise(c)

    @jax.jit
    def draw(params: Any, codec_params: Any, numbers: Array, labels: Array) -> tuple[Array, Array]:
        key = jax.random.key(c.seed)
        if given is None:
            noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), sizes.block_shape))(numbers)
        else:
            noise = jnp.asarray(given)[numbers]
        blocks = sample(
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
    path, shape = c.sample.noise, (c.sample.n, *config_lib.sizes(c).block_shape)
    if not path:
        return None
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"config.sample.noise={path} cannot be read: {partitioning.first_line(error)}.") from None
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
    blocks = np.asarray(codec.to_blocks(z, config_lib.sizes(c)))
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
    """Shapes and shardings of the model's parameters: the target of a restore."""
    key = jax.random.key(0)  # out here: the mesh may be one to compile for, on which nothing runs
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(functools.partial(madformer.init, model), key)
    return partitioning.abstract(nn.meta.unbox(boxed), partitioning.shardings(boxed, mesh))


def run(c: ConfigDict, workdir: str) -> None:
    """--mode=sample: writes workdir/samples/<protocol>.png and .npz with `sample.n` images from the newest checkpoint.

    Raises:
      ConfigError: a setting is wrong, there is no checkpoint, or it does not fit; nothing is written then.
    """
    config_lib.validate(c)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=("model", "codec"))
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, images_codec = madformer.build(c), codec.build(c)
    target = abstract_params(model, mesh)
    with partitioning.scope(mesh):
        item = "ema" if c.sample.weights == "ema" else "params"
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            step, restored, _ = checkpoints.restore({item: target})
        logging.info(
            "sampling %d images with the %s weights of step %d; attention %s",
            c.sample.n, c.sample.weights, step, attention.in_sampling(model.attention),
        )  # fmt: skip
        draw = make_draw(c, model, images_codec.decode)
        codec_params = jax.device_put(images_codec.params, partitioning.replicated(mesh))
        progress = jax.process_index() == 0
        images, latents, labels = draw_all(c, c.sample.n, draw, restored[item], codec_params, mesh, progress=progress)
    if jax.process_index():
        return
    s = c.sample
    origin = f"noise-{epath.Path(s.noise).stem}" if s.noise else f"seed{c.seed}"
    protocol = {"step": step, "seed": c.seed, "noise": s.noise} | {
        name: s[name] for name in ("weights", "solver", "spacing", "steps", "guidance", "clip", "n")
    }
    name = f"step_{step:06d}_{s.weights}_{s.solver}_{s.spacing}{s.steps}_w{s.guidance:g}_{origin}_n{s.n}"
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.npz.part"
    with part.open("wb") as file:
        np.savez(file, images=images, latents=latents, labels=labels, protocol=json.dumps(protocol))
    part.replace(folder / f"{name}.npz")
    write_png(folder / f"{name}.png", as_grid(images))
    logging.info("wrote %s.png and .npz to %s", name, folder)
