"""--mode=sample: images from a checkpoint of a workdir. A run that was interrupted goes on where it was.

workdir/samples/NAME/ holds

  protocol.json              all that decides the images; NAME ends in its hash; and names of the classes drawn
  shard-00000-of-00004.npz   the first `sample.shard` images with their numbers, labels and latents, and so on
  grid.png                   the first `sample.grid` images
  film.webp                  how they come into being, if `sample.film` asks for it
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from madformer_jax.config import aliases, class_labels
from madformer_jax.config import schema as config_lib
from madformer_jax.data import preprocess, text
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.runtime import checkpoint, memory, partitioning, progress, storage
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import codec, generation, prompts, trained_model
from madformer_jax.sampling.generation import SampleBatch
from madformer_jax.weights.fingerprint import fingerprint

MAX_FILM_FRAMES, FRAME_MS, LAST_FRAME_MS, MIN_FILM_SIDE = (
    60,
    80,
    2500,
    128,
)  # of a film, in which smaller images are enlarged


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes the `sample.n` images of the config that are not there yet, from the newest checkpoint or from `sample.step`.

    Shards that are there are checked. Every process takes part in drawing each batch; they write the shards by turns.

    Returns:
      The folder, the step, how many images there are and were drawn, and the seconds that took.

    Raises:
      ConfigError: a setting is wrong, there is no checkpoint, or it does not fit; nothing is written then. Or a value is not
        finite, or the folder cannot be written; finished shards stay.
    """
    began, s = time.monotonic(), c.sample
    config_lib.validate(c)
    if s.film and jax.process_count() > 1:
        raise ConfigError(f"config.sample.film={s.film} is made by one process alone: start another sampling for it.")
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, images_codec = madformer.build(c), codec.build(c)
    target = generation.abstract_params(model, mesh)
    memory.check_state_fits("sampling", mesh, parameters=target)
    with partitioning.scope(mesh):
        step, newest, params, names = _restore(c, workdir, target)
        codec_params = jax.device_put(images_codec.load(), partitioning.replicated(mesh))
        protocol = _protocol(c, step, fingerprint(params, mesh), fingerprint(codec_params, mesh))
        folder = epath.Path(workdir) / "samples" / _folder_name(c, protocol)
        missing = _missing_shards(c, folder)
        numbers = np.concatenate([_shard_image_numbers(c, k) for k in missing] or [np.arange(0)])
        logging.info(
            "sampling %d images with the %s weights of step %d, %d of them drawn before; %d of %d steps guided; attention %s",
            s.n, s.weights, step, s.n - len(numbers), np.sum(generation.guidance_scales(c) != 1), s.steps,
            model.attention,
        )  # fmt: skip
        if s.labels:
            logging.info("classes of these images: %s", class_labels.summary(config_lib.sample_labels(c), names))
        draw = progress.log_compilation(
            generation.make_sample_fn(c, model, images_codec.decode), "the sampling program"
        )
        batches = interruptible(generation.batches(c, draw, params, codec_params, mesh, numbers))
        with storage.wrap_errors(f"{folder} cannot be written"):
            if jax.process_index() == 0:
                storage.write_json(folder / "protocol.json", protocol | _class_names(c, names))
        for k, shard in _assemble_shards(c, _with_progress_bar(batches, len(numbers))):
            if k % jax.process_count() == jax.process_index():
                with storage.wrap_errors(f"{folder} cannot be written"):
                    generation.write_shard(folder / _shard_file(c, k), shard)
    partitioning.sync("samples")  # all shards are there
    if jax.process_index() == 0:
        with storage.wrap_errors(f"{folder} cannot be written"):
            images = _first_images(c, folder)
            grid = generation.tile_grid(prompts.add_caption_strips(images, prompts.load(c)[: len(images)]))
            generation.write_png(folder / "grid.png", grid)
        logging.info("wrote %d images in %d shards and grid.png to %s", s.n, _shard_count(c), folder)
        if newest != step and s.step < 0:
            logging.warning("these images are of step %d: the newest checkpoint, of step %s, is damaged.", step, newest)
    if s.film:
        with storage.wrap_errors(f"{folder} cannot be written"):
            _write_film(c, folder / "film.webp", trained_model.Model(c, params, codec_params=codec_params))
    seconds = time.monotonic() - began
    return {"folder": str(folder), "step": step, "n": s.n, "drawn": len(numbers), "seconds": seconds}


def _restore(c: ConfigDict, workdir: str, target: Any) -> tuple[int, int | None, Any, list[str]]:
    """Returns the step that is sampled from, the newest one, the parameters and the class names.

    Class names in `sample.labels` are replaced by numbers.
    """
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        newest = checkpoints.last
        step, params = checkpoints.restore_weights(c.sample.weights, target, c.sample.step)
        names = checkpoints.class_names(step)
        config_lib.resolve_label_numbers(c, names)
        text.check_tokenizer_identity(c, checkpoints.meta(step), step, workdir)
    return step, newest, params, names


def _write_film(c: ConfigDict, path: epath.Path, model: trained_model.Model) -> None:
    """The images of the grid as they come into being, at most FRAMES pictures of them, the last one for longer."""
    c = c.copy_and_resolve_references()
    c.sample.n = min(c.sample.grid, c.sample.n)
    every = -(-c.model.blocks * c.sample.steps // MAX_FILM_FRAMES)
    words, shown, times = prompts.load(c), [], max(1, MIN_FILM_SIDE // c.data.image_size)
    for i, frame in enumerate(model.frames(c, "step")):
        if not i % every or frame.step == c.sample.steps:
            large = frame.images if words else frame.images.repeat(times, axis=1).repeat(times, axis=2)
            grid = generation.tile_grid(prompts.add_caption_strips(large, words))
            shown.append(preprocess.to_pil(grid))
    lasting = [FRAME_MS] * (len(shown) - 1) + [LAST_FRAME_MS]
    first, *others = shown
    storage.write(
        path,
        lambda file: first.save(
            file, "webp", save_all=True, append_images=others, duration=lasting, loop=0, quality=80
        ),
    )
    logging.info("wrote a film of %d pictures: %s", len(shown), path)


# ---- what is drawn


def _protocol(c: ConfigDict, step: int, weights: str, codec_weights: str) -> dict[str, Any]:
    """All that decides the images and the files they lie in."""
    s, noise = c.sample, generation.config_noise_digest(c)
    kept = (
        "weights", "solver", "spacing", "steps", "guidance", "guidance_schedule", "guidance_interval", "labels",
        "label_sampling", "n", "shard",
    )  # fmt: skip
    return {
        "step": step,
        "seed": c.seed if noise is None or s.label_sampling == "random" else None,
        "noise": noise,
        **{name: s[name] for name in kept},
        "clip": s.clip_x0,
        "labels": class_labels.format_numbers(s.labels),
        **prompts.describe(c),
        "fingerprint": weights,
        "model": aliases.first_names(json.loads(c.model.to_json()), "model."),
        "image": [c.data.image_size, c.data.image_size, c.data.channels],
        "codec": codec.describe(c, codec_weights),
    }


def _class_names(c: ConfigDict, names: list[str]) -> dict[str, Any]:
    """Returns the names of the classes that are drawn, by number: for readers, not part of what decides the images."""
    return (
        {"classes": {k: class_labels.display_name(k, names) for k in sorted(set(config_lib.sample_labels(c)))}}
        if names
        else {}
    )


def _folder_name(c: ConfigDict, protocol: dict[str, Any]) -> str:
    s = c.sample
    origin = f"noise-{epath.Path(s.noise).stem}" if s.noise else f"seed{c.seed}"
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    low, high = s.guidance_interval
    guidance = f"w{s.guidance:g}" + "linear" * (s.guidance_schedule == "linear")
    guidance += f"_t{low}-{high}" * ((low, high) != (0, 999))
    kind = f"{s.weights}_{s.solver}_{s.spacing}{s.steps}_{guidance}"
    return f"step_{protocol['step']:06d}_{kind}_{origin}_n{s.n}_{digest}"


# ---- shards


def _shard_count(c: ConfigDict) -> int:
    return -(-c.sample.n // c.sample.shard)


def _shard_file(c: ConfigDict, k: int) -> str:
    return f"shard-{k:05d}-of-{_shard_count(c):05d}.npz"


def _shard_image_numbers(c: ConfigDict, k: int) -> np.ndarray:
    """The images of shard k."""
    return np.arange(k * c.sample.shard, min((k + 1) * c.sample.shard, c.sample.n))


def _missing_shards(c: ConfigDict, folder: epath.Path) -> list[int]:
    """The shards that are not there or not as they should be; each process looks at its share, and all learn of all."""
    share = range(jax.process_index(), _shard_count(c), jax.process_count())
    found = np.zeros(_shard_count(c), bool)
    for k in share:
        found[k] = _is_shard_valid(c, folder, k)
    return np.flatnonzero(~multihost_utils.process_allgather(found).reshape(-1, len(found)).any(0)).tolist()


def _is_shard_valid(c: ConfigDict, folder: epath.Path, k: int) -> bool:
    try:
        with storage.wrap_errors(f"{folder} cannot be read"):
            shard = generation.read_shard(folder / _shard_file(c, k))
    except generation.DamagedError as error:
        logging.warning("%s: drawing it again", error)
        return False
    return shard is not None and np.array_equal(shard.numbers, _shard_image_numbers(c, k))


def _assemble_shards(c: ConfigDict, batches: Iterable[SampleBatch]) -> Iterator[tuple[int, SampleBatch]]:
    """Batches, in order of their numbers, cut and joined to shards."""
    parts: list[SampleBatch] = []
    for batch in batches:
        of = batch.numbers // c.sample.shard
        for k in np.unique(of).tolist():
            parts.append(SampleBatch(*(x[of == k] for x in batch)))
            if parts[-1].numbers[-1] == _shard_image_numbers(c, k)[-1]:
                yield k, SampleBatch(*map(np.concatenate, zip(*parts, strict=True)))
                parts = []


def _with_progress_bar(batches: Iterable[SampleBatch], n: int) -> Iterator[SampleBatch]:
    """The batches, with a bar of progress."""
    with tqdm(total=n, desc="sampling", unit="image", disable=not n or jax.process_index() != 0) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.numbers))


def _first_images(c: ConfigDict, folder: epath.Path) -> np.ndarray:
    """The images of the grid, from as many shards as they lie in."""
    n = min(c.sample.grid, c.sample.n)
    shards = itertools.islice(generation.read_shards(folder), -(-n // c.sample.shard))
    return np.concatenate([shard.images for shard in shards])[:n]
