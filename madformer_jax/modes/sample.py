"""--mode=sample: draws images from a checkpoint of a workdir.

An interrupted run continues from its finished shards. workdir/samples/NAME/ has these files:

  protocol.json              everything that determines the images, and the names of their classes;
                             NAME ends in its hash
  shard-00000-of-00004.npz   the first `sample.shard` images with their numbers, labels and latents
  grid.png                   the first `sample.grid` images
  film.webp                  the images while they are drawn, if `sample.film` asks for it
  latents.npy                the latents (n, h, w, C) as the encoder gave them, float32, for codec `external`

A new setting that changes the images must be added to `TrainedModel.protocol`, which --mode=evaluate
uses too.
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

from madformer_jax.config import aliases, block_steps, class_labels, seeds
from madformer_jax.config import schema as config_lib
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, partitioning, progress, storage
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import codec, editing, generation, prompts, solving, trained_model
from madformer_jax.sampling.generation import SampleBatch
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.weights.fingerprint import fingerprint

MAX_FILM_FRAMES = 60
FRAME_MS, LAST_FRAME_MS = 80, 2500  # duration of the frames of a film
MIN_FILM_SIDE = 128  # pixels; smaller images are enlarged in a film


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Draws and writes those of the `sample.n` images that the folder lacks.

    Existing shards are verified. All processes draw each batch together and write the shards in
    turn.

    Returns:
      The folder, the step, the number of images, the number that was drawn, and the seconds.

    Raises:
      ConfigError: A setting is wrong, the workdir has no checkpoint, or the checkpoint does not fit
        the config; nothing is written then. Or a value is not finite or the folder cannot be
        written; finished shards stay.
    """
    began, s = time.monotonic(), c.sample
    config_lib.validate(c)
    edit = editing.read_edit(c)
    if s.film and jax.process_count() > 1:
        raise ConfigError(f"config.sample.film={s.film} is made by one process alone: start another sampling for it.")
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    trained = TrainedModel.open(c, workdir, check_memory_for="sampling")
    mesh, step, params, names = trained.mesh, trained.step, trained.params, trained.class_names
    config_lib.resolve_label_numbers(c, names)
    with partitioning.scope(mesh):
        codec_params = trained.load_codec_params()
        protocol = _protocol(c, step, fingerprint(params, mesh), fingerprint(codec_params, mesh)) | trained.protocol(c)
        protocol |= editing.describe(edit)
        folder = epath.Path(workdir) / "samples" / _folder_name(c, protocol)
        missing = _missing_shards(c, folder)
        numbers = np.concatenate([_shard_image_numbers(c, k) for k in missing] or [np.arange(0)])
        scales = np.concatenate([solving.block_guidance_scales(c, block) for block in range(c.model.blocks)])
        logging.info(
            "sampling %d images with the %s weights of step %d, %d of them drawn before; %d of %d evaluations of an image "
            "guided; attention %s",
            s.n, s.weights, step, s.n - len(numbers), np.sum(scales != 1), len(scales),
            trained.network.config.attention.name,
        )  # fmt: skip
        if s.labels:
            logging.info("classes of these images: %s", class_labels.summary(config_lib.sample_labels(c), names))
        network, sampled_params = trained.sampled(c)
        sample_fn = progress.log_compilation(
            generation.make_sample_fn(c, network, trained.codec.decode), "the sampling program"
        )
        conditions = generation.read_conditions(c)
        if edit is not None:
            kept_blocks = editing.encode(edit, trained.codec, codec_params, derive_sizes(c))
            conditions = conditions._replace(kept_blocks=kept_blocks)
        batches = interruptible(
            generation.batches(c, sample_fn, sampled_params, codec_params, mesh, numbers, conditions=conditions)
        )
        with storage.wrap_errors(f"{folder} cannot be written"):
            if jax.process_index() == 0:
                storage.write_json(folder / "protocol.json", protocol | _class_names(c, names))
        for k, shard in _assemble_shards(c, _with_progress_bar(batches, len(numbers))):
            if k % jax.process_count() == jax.process_index():
                with storage.wrap_errors(f"{folder} cannot be written"):
                    generation.write_shard(folder / _shard_file(c, k), shard)
    partitioning.sync("samples")  # All shards must exist before they are read.
    if jax.process_index() == 0:
        with storage.wrap_errors(f"{folder} cannot be written"):
            images = _first_images(c, folder)
            grid = generation.tile_grid(prompts.add_caption_strips(images, prompts.load(c)[: len(images)]))
            generation.write_png(folder / "grid.png", grid)
            if c.codec.name == "external":
                _write_latents(c, folder)
        logging.info("wrote %d images in %d shards and grid.png to %s", s.n, _shard_count(c), folder)
        if trained.newest_step != step and s.step < 0:
            logging.warning(
                "these images are of step %d: the newest checkpoint, of step %s, is damaged.", step, trained.newest_step
            )
    if s.film:
        with storage.wrap_errors(f"{folder} cannot be written"):
            _write_film(c, folder / "film.webp", trained_model.Model(c, trained, codec_params))
    seconds = time.monotonic() - began
    return {"folder": str(folder), "step": step, "n": s.n, "drawn": len(numbers), "seconds": seconds}


def _write_latents(c: ConfigDict, folder: epath.Path) -> None:
    """Writes the latents of all shards without the scale that the model sees."""
    latents = np.concatenate([shard.latents for shard in generation.read_shards(folder)])
    latents = codec.external_scale(c).invert(latents)
    storage.write(folder / "latents.npy", lambda file: np.save(file, latents))
    logging.info(
        "wrote the latents %s to %s; grid.png shows their first channels", latents.shape, folder / "latents.npy"
    )


def _write_film(c: ConfigDict, path: epath.Path, model: trained_model.Model) -> None:
    """Writes a film of the grid while it is drawn, of about `MAX_FILM_FRAMES` frames and one for each block at most."""
    c = c.copy_and_resolve_references()
    c.sample.n = min(c.sample.grid, c.sample.n)
    steps = block_steps.steps_of_blocks(c)
    every = -(-sum(steps) // MAX_FILM_FRAMES)
    captions, frames, scale = prompts.load(c), [], max(1, MIN_FILM_SIDE // c.data.image_size)
    for i, frame in enumerate(model.stream_config(c, "step", editing.read_edit(c))):
        if not i % every or frame.step == steps[frame.block]:
            large = frame.images if captions else frame.images.repeat(scale, axis=1).repeat(scale, axis=2)
            grid = generation.tile_grid(prompts.add_caption_strips(large, captions))
            frames.append(preprocess.to_pil(grid))
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "quality": 80}
    storage.write(path, lambda file: frames[0].save(file, "webp", **options))
    logging.info("wrote a film of %d pictures: %s", len(frames), path)


# ---- protocol


def _protocol(c: ConfigDict, step: int, weights: str, codec_weights: str) -> dict[str, Any]:
    """Returns everything that determines the images and their shards."""
    s, noise = c.sample, generation.hash_noise(generation.open_noise(c))
    sample_fields = (
        "weights", "solver", "spacing", "steps", "guidance", "guidance_schedule", "guidance_interval", "labels",
        "label_sampling", "n", "shard",
    )  # fmt: skip
    uses_seed = noise is None or s.label_sampling == "random" or solving.depends_on_seed(c)
    return {
        "step": step,
        "seed": seeds.of(c, "sample") if uses_seed else None,
        "noise": noise,
        **{name: s[name] for name in sample_fields},
        "clip": s.clip_x0,
        **({"block_order": s.block_order} if s.block_order else {}),
        "labels": class_labels.format_numbers(s.labels),
        **prompts.describe(c),
        "fingerprint": weights,
        "model": _model_fields(c),
        **solving.path_protocol(c),
        "image": [c.data.image_size, c.data.image_size, c.data.channels],
        "codec": codec.describe(c, codec_weights),
    }


def _model_fields(c: ConfigDict) -> dict[str, Any]:
    """Returns the model's fields. Fields that earlier versions did not have are left out at their defaults."""
    values = aliases.first_names(json.loads(c.model.to_json()), "model.")
    added = {"block_order": "raster", "block_shape": "square"}
    return {name: value for name, value in values.items() if name not in added or value != added[name]}


def _class_names(c: ConfigDict, names: list[str]) -> dict[str, Any]:
    """Returns the names of the drawn classes for protocol.json; they are not part of its hash."""
    drawn = sorted(set(config_lib.sample_labels(c)))
    return {"classes": {k: class_labels.display_name(k, names) for k in drawn}} if names else {}


def _folder_name(c: ConfigDict, protocol: dict[str, Any]) -> str:
    """Returns the folder's name: the main settings and a hash of the protocol."""
    s = c.sample
    origin = f"noise-{epath.Path(s.noise).stem}" if s.noise else f"seed{seeds.of(c, 'sample')}"
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    low, high = s.guidance_interval
    guidance = f"w{s.guidance:g}" + "linear" * (s.guidance_schedule == "linear")
    guidance += f"_t{low}-{high}" * ((low, high) != (0, 999))
    guidance += "guide" * bool(s.guide) + "_edit" * bool(s.image)
    by_block = block_steps.steps_of_blocks(c)
    steps = s.steps if s.steps_by_block == block_steps.CONSTANT else f"{by_block[0]}to{by_block[-1]}"
    kind = f"{s.weights}{s.ema or ''}_{s.solver}_{s.spacing}{steps}_{guidance}"
    kind += f"_D{s.diffusion_depth}" * bool(s.diffusion_depth) + f"_context{s.context_noise}" * bool(s.context_noise)
    return f"step_{protocol['step']:06d}_{kind}_{origin}_n{s.n}_{digest}"


# ---- shards


def _shard_count(c: ConfigDict) -> int:
    return -(-c.sample.n // c.sample.shard)


def _shard_file(c: ConfigDict, k: int) -> str:
    return f"shard-{k:05d}-of-{_shard_count(c):05d}.npz"


def _shard_image_numbers(c: ConfigDict, k: int) -> np.ndarray:
    """Returns the numbers of the images of shard k."""
    return np.arange(k * c.sample.shard, min((k + 1) * c.sample.shard, c.sample.n))


def _missing_shards(c: ConfigDict, folder: epath.Path) -> list[int]:
    """Returns the shards that are missing or invalid; the processes share the work of checking."""
    valid = np.zeros(_shard_count(c), bool)
    for k in range(jax.process_index(), _shard_count(c), jax.process_count()):
        valid[k] = _is_shard_valid(c, folder, k)
    return np.flatnonzero(~multihost_utils.process_allgather(valid).reshape(-1, len(valid)).any(0)).tolist()


def _is_shard_valid(c: ConfigDict, folder: epath.Path, k: int) -> bool:
    try:
        with storage.wrap_errors(f"{folder} cannot be read"):
            shard = generation.read_shard(folder / _shard_file(c, k))
    except generation.DamagedError as error:
        logging.warning("%s: drawing it again", error)
        return False
    return shard is not None and np.array_equal(shard.numbers, _shard_image_numbers(c, k))


def _assemble_shards(c: ConfigDict, batches: Iterable[SampleBatch]) -> Iterator[tuple[int, SampleBatch]]:
    """Splits and joins batches, which are in the order of their numbers, to shards."""
    parts: list[SampleBatch] = []
    for batch in batches:
        shards = batch.numbers // c.sample.shard
        for k in np.unique(shards).tolist():
            parts.append(SampleBatch(*(x[shards == k] for x in batch)))
            if parts[-1].numbers[-1] == _shard_image_numbers(c, k)[-1]:
                yield k, SampleBatch(*map(np.concatenate, zip(*parts, strict=True)))
                parts = []


def _with_progress_bar(batches: Iterable[SampleBatch], n: int) -> Iterator[SampleBatch]:
    """Yields the batches and shows a progress bar."""
    with tqdm(total=n, desc="sampling", unit="image", disable=not n or jax.process_index() != 0) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.numbers))


def _first_images(c: ConfigDict, folder: epath.Path) -> np.ndarray:
    """Reads the images of the grid from the first shards."""
    n = min(c.sample.grid, c.sample.n)
    shards = itertools.islice(generation.read_shards(folder), -(-n // c.sample.shard))
    return np.concatenate([shard.images for shard in shards])[:n]
