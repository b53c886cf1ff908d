"""--mode=evaluate: scores of a workdir's checkpoints, or of existing images, against a reference.

    python -m madformer_jax.main --workdir=runs/digits --mode=evaluate --config.evaluate.n=1000

Each checkpoint and setting has a result file workdir/evaluations/<hash of its protocol>.json. The
folder `real` beside the reference has such files of real images. Existing results are not computed
again, and a killed run continues at its first missing shard.
`modes.sweep` and the command line call `run`. The scores themselves are in
`evaluation.sample_scores` and `evaluation.score_summary`.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from madformer_jax.config import aliases, class_labels, seeds
from madformer_jax.config import schema as config_lib
from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import (
    held_out_scores,
    images,
    judge_paths,
    likelihood,
    nearest_pairs,
    sample_scores,
    sampling_grid,
    score_summary,
    shards,
)
from madformer_jax.evaluation.judge import Judge, open_judge, open_training
from madformer_jax.modes import reference as reference_mode
from madformer_jax.runtime import checkpoint, partitioning, progress, storage, stored_config
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import codec, generation, prompts, solving
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.weights.fingerprint import fingerprint

# Fields of `sample` in every protocol, under their first names (`clip` is `clip_x0`). `TrainedModel.protocol`,
# `prompts.describe` and `block_order` add the others.
SAMPLE_PROTOCOL_FIELDS = (
    "weights", "solver", "spacing", "steps", "guidance", "guidance_schedule", "guidance_interval", "clip", "labels",
    "label_sampling", "noise",
)  # fmt: skip

ImageReader = Callable[[np.ndarray], np.ndarray]  # from numbers (b,) to images uint8 (b, H, W, c)
ShardExtractor = Callable[[Sequence[shards.Shard]], Iterator[shards.Arrays]]


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Scores the images or checkpoints that the config names, and prints a table.

    Returns:
      `{"results": [...]}` with the content of each result file. Its entry `real` is the result of real
      images, unless there are none. With `evaluate.held_out_n` or `by_block` also `"held_out"`, the
      same for the scores on held-out images.

    Raises:
      ConfigError: A setting, the reference, the images or a checkpoint is wrong or missing. The
        error comes before any sampling.
    """
    check(c)
    held_out = held_out_scores.open_images(c)
    results = []
    if c.evaluate.images:
        judge = open_judge(c, workdir, c.evaluate.n)
        results = _add_real_images(c, workdir, judge, [_judge_images(c, _results_folder(workdir), judge)])
    elif c.evaluate.n:
        results = _judge_checkpoints(c, workdir)
    if results and jax.process_index() == 0:
        print(score_summary.comparison_table([*results, *score_summary.mean_over_checkpoints(results)]))
    if held_out is None:
        return {"results": results}
    held_out_results = held_out_scores.run(c, workdir, held_out)
    if jax.process_index() == 0:
        print(held_out_scores.text_table(held_out_results))
    return {"results": results, "held_out": held_out_results}


def _results_folder(workdir: str) -> str:
    return os.path.join(workdir, "evaluations")


def check(c: ConfigDict) -> None:
    """Checks the config and its grid without reading files.

    Raises:
      ConfigError: A setting of the config or of its grid is invalid, or does not apply to the
        images.
    """
    config_lib.validate(c)
    if c.evaluate.degrade and not c.evaluate.images:
        raise ConfigError("config.evaluate.degrade applies to existing images only: name them in evaluate.images.")
    if c.evaluate.grid and c.evaluate.images:
        raise ConfigError(
            "config.evaluate.grid samples from checkpoints, and evaluate.images names existing images: set one."
        )
    if not c.evaluate.n and (c.evaluate.grid or not c.evaluate.held_out_n):
        raise ConfigError(
            "config.evaluate.n=0 draws no samples: evaluate.grid and sweeps need some. Set it, or for the scores of held-out "
            "images and blocks alone set config.evaluate.held_out_n."
        )
    for setting in sampling_grid.expand_configs(c):
        config_lib.validate(setting)


def check_before_training(c: ConfigDict, workdir: str) -> None:
    """Checks before training that `train.judge` will be able to score the trained model.

    Raises:
      ConfigError: `check` fails, the reference or its network can neither be opened nor made, there
        are too few images, or the noise or a prompt of a setting does not fit.
    """
    check(c)
    training = images.from_source(c, "train", shuffled=False, config_field="train.judge")
    if training.n < c.evaluate.n:
        raise ConfigError(
            f"config.evaluate.n={c.evaluate.n}: train.judge scores as many real images of split 'train', and there are only "
            f"{training.n}: set a smaller config.evaluate.n."
        )
    if epath.Path(judge_paths.reference_path(c, workdir)).exists():
        open_judge(c, workdir, c.evaluate.n)
    else:
        score_summary.check_counts(c.evaluate.n, reference_mode.check(c, workdir).n)
        if c.evaluate.training:
            open_training(c)
    grid = sampling_grid.expand_configs(c)
    generation.open_noise(grid[0])
    for setting in _unique_prompt_configs(grid).values():
        prompts.tokenize(setting)
    likelihood.check(c)
    held_out_scores.open_images(c)


def _judge_images(c: ConfigDict, folder: str, judge: Judge) -> dict[str, Any]:
    """Returns the result of the existing images that `evaluate.images` names, stored in a folder."""
    data = images.open_images(c)
    if data.n < c.evaluate.n:
        raise ConfigError(f"config.evaluate.n={c.evaluate.n}: there are only {data.n} images in {c.evaluate.images}.")

    extract = functools.partial(
        images.extract_missing_shards, data, judge.extract, images.UnreadableImages(c.evaluate.n, c.data.max_corrupt)
    )
    labeled = bool(data.classes)
    metadata = data.protocol | {"content": data.digest(c.evaluate.n), "labelled": labeled}
    return _load_or_make_result(
        c, folder, judge, metadata, shards.read_batch_size(c), extract,
        read=lambda numbers: data.read(numbers).images, labeled=labeled,
    )  # fmt: skip


def _add_real_images(
    c: ConfigDict, workdir: str, judge: Judge, results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Adds to each result the entry `real`, the result of as many real images: the floor of all scores.

    The images are not those of the reference: of the split "train", or "test" if the reference has
    "train". The result is in a folder beside the reference, so that all runs with the reference share
    it. The memorization scores are those of the reference's images. If there are no other real images,
    or too few, nothing is added, and a warning is logged.
    """
    real_config = c.copy_and_resolve_references()
    split = "test" if c.evaluate.split == "train" else "train"
    real_config.evaluate.images, real_config.evaluate.degrade = f"data:{split}", ""
    folder = os.path.join(os.path.dirname(judge_paths.reference_path(c, workdir)), "real")
    try:
        if c.evaluate.split == "all":
            raise ConfigError("the reference of config.evaluate.split='all' holds all images.")
        real = _judge_images(real_config, folder, judge._replace(training=None))
    except ConfigError as error:
        logging.warning("the table has no row of real images: %s", error)
        return list(results)
    if judge.training is not None:
        real["scores"] |= score_summary.memorization_scores(judge.training, None)
    return [result | {"real": real} for result in results]


def _judge_checkpoints(c: ConfigDict, workdir: str) -> list[dict[str, Any]]:
    """Returns a result for each checkpoint and setting. The settings vary fastest."""
    codec.adopt_scale(c, workdir)
    grid = sampling_grid.expand_configs(c)
    sampling_grid.log_warnings(c, grid)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    judge = open_judge(c, workdir, c.evaluate.n)
    noise = generation.open_noise(grid[0])  # `sample.noise` is the same in all settings
    noise_digest = generation.hash_noise(noise) or ""
    unique_prompts = _unique_prompt_configs(grid)
    texts = {name: prompts.tokenize(setting) for name, setting in unique_prompts.items()}
    prompt_metadata = {name: prompts.describe(setting, texts[name]) for name, setting in unique_prompts.items()}
    captions = likelihood.open_captions(c)
    extra_protocol = {} if captions is None else {"bits": captions.protocol}
    programs: dict[Any, generation.SampleFn] = {}
    results: dict[tuple[int, int], dict[str, Any]] = {}
    steps = sampling_grid.select_checkpoints(c.evaluate.checkpoints, checkpoint.complete_steps(workdir))
    settings_by_weights = {(setting.sample.weights, setting.sample.ema): setting for setting in grid}
    codec_params: Any = None
    guide: TrainedModel | None = None
    for step, weights in itertools.product(steps, sorted(settings_by_weights)):
        trained = TrainedModel.open(settings_by_weights[weights], workdir, step, "evaluation", guide)
        guide = trained.guide  # opened once for all checkpoints
        params, mesh, names = trained.params, trained.mesh, trained.class_names
        with partitioning.scope(mesh):
            if codec_params is None:
                codec_params = trained.load_codec_params()
            codec_metadata = {"codec": codec.describe(c, fingerprint(codec_params, mesh))} if codec_params else {}
            metadata = {"step": step, "fingerprint": fingerprint(params, mesh), "seed": seeds.of(c, "sample")}
            metadata |= codec_metadata | solving.path_protocol(c)
            # The captions' scores depend on the weights only, so all settings share them.
            extra_scores = (
                functools.cache(functools.partial(captions.scores, trained.network, params, mesh)) if captions else dict
            )
            for i, setting in enumerate(grid):
                if (setting.sample.weights, setting.sample.ema) != weights:
                    continue
                config_lib.resolve_label_numbers(setting, names)
                s = setting.sample
                conditions = generation.SampleConditions(generation.read_labels(setting), noise, texts[s.prompts])
                chosen = class_labels.format_numbers(s.labels)
                if chosen:
                    shown = class_labels.summary(config_lib.sample_labels(setting), names)
                    logging.info("classes of the images of step %d: %s", step, shown)
                # Through JSON, so that the values equal those of a result file; under the fields' first names.
                settings = aliases.first_names(json.loads(s.to_json()), "sample.")
                settings |= {"noise": noise_digest, "labels": chosen}
                network, sampled_params = trained.sampled(setting)
                program, padded_steps = sampling_grid.program_key(setting, grid)
                if program not in programs:
                    sample_fn = generation.make_sample_fn(setting, network, trained.codec.decode)
                    steps_text = "any number of" if padded_steps else str(s.steps)
                    programs[program] = progress.log_compilation(
                        sample_fn, f"the sampling program of {steps_text} steps"
                    )
                sample_fn = programs[program]
                if padded_steps:
                    sample_fn = solving.pad_steps(sample_fn, setting, padded_steps)
                draw = functools.partial(
                    generation.batches, setting, sample_fn, sampled_params, codec_params, mesh,
                    max_batch=s.n, conditions=conditions,
                )  # fmt: skip
                batch_size = generation.batch_size(setting, mesh)
                results[step, i] = _load_or_make_result(
                    setting, _results_folder(workdir), judge,
                    metadata
                    | {name: settings[name] for name in SAMPLE_PROTOCOL_FIELDS}
                    | prompt_metadata[s.prompts]
                    | ({"block_order": s.block_order} if s.block_order else {})
                    | trained.protocol(setting),
                    batch_size * -(-shards.MAX_BATCH // batch_size),
                    functools.partial(map, functools.partial(_sample_and_extract, draw, judge)),
                    read=functools.partial(_draw_images, draw), labeled=bool(c.model.classes),
                    extra_scores=extra_scores, extra_protocol=extra_protocol,
                )  # fmt: skip
    return _add_real_images(c, workdir, judge, [results[step, i] for step in steps for i in range(len(grid))])


def _unique_prompt_configs(grid: Sequence[ConfigDict]) -> dict[str, ConfigDict]:
    """Returns one setting for each value of `sample.prompts`."""
    return {setting.sample.prompts: setting for setting in grid}


def _draw_images(draw: Callable[[np.ndarray], Iterator[generation.SampleBatch]], numbers: np.ndarray) -> np.ndarray:
    """Samples the images with these numbers again."""
    return np.concatenate([batch.images for batch in draw(numbers)])


def _sample_and_extract(
    draw: Callable[[range], Iterator[generation.SampleBatch]], judge: Judge, shard: shards.Shard
) -> shards.Arrays:
    """Samples the images of a shard and extracts their features."""
    batches = interruptible(draw(range(shard.first, shard.stop)))
    return sample_scores.extract_features(batches, judge.extract, judge.attribute_classifier)


def _load_or_make_result(
    c: ConfigDict,
    folder: str,
    judge: Judge,
    metadata: Mapping[str, Any],
    size: int,
    extract: ShardExtractor,
    *,
    read: ImageReader,
    labeled: bool,
    extra_scores: Callable[[], dict[str, score_summary.Score]] = dict,
    extra_protocol: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads the result of a set of images from its file, or computes and writes it.

    Args:
      c: The config of the images.
      folder: The folder of the results.
      judge: The reference and the networks.
      metadata: JSON that identifies the images.
      size: Images of a shard.
      extract: Yields the arrays of each missing shard.
      read: Reads the images with ascending numbers.
      labeled: Whether the labels are classes of the data.
      extra_scores: Computes further scores.
      extra_protocol: JSON that identifies the inputs of the further scores.
    """
    protocol = {**judge.protocol, **(extra_protocol or {}), "images": dict(metadata)}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    path, parts = os.path.join(folder, f"{key}.json"), epath.Path(folder) / key
    stored = _load_result(c, path)
    if stored is not None and not _exist(parts).any():
        logging.info("%s exists already", path)
        return stored
    with shards.exclusive_lock(parts):
        collected = shards.Shards(parts, c.evaluate.n, size)
        # Another job may have written it while this job waited for the lock.
        stored = _load_result(c, path)
        if stored is None:
            return _make_result(c, path, protocol, collected, judge, extract, read, labeled, extra_scores)
        collected.remove()  # of a job that was killed between its result and the removal
        return stored


def _load_result(c: ConfigDict, path: str) -> dict[str, Any] | None:
    """Loads a result; None without one, or without the features that the config asks for."""
    stored = shards.read_json_object(path, "protocol", "scores")
    if stored and c.evaluate.keep_features and not _exist(held_out_scores.values_path(path)).all():
        return None
    return stored


def _exist(path: storage.Path) -> np.ndarray:
    """Returns whether each process sees a path, bool (processes,)."""
    return shards.allgather_rows({"exists": np.array([epath.Path(path).exists()])})["exists"]


def _make_result(
    c: ConfigDict,
    path: str,
    protocol: dict[str, Any],
    collected: shards.Shards,
    judge: Judge,
    extract: ShardExtractor,
    read: ImageReader,
    labeled: bool,
    extra_scores: Callable[[], dict[str, score_summary.Score]],
) -> dict[str, Any]:
    """Extracts the missing shards, computes the scores, and writes the result."""
    missing = collected.missing()
    with tqdm(
        total=sum(shard.n for shard in missing), desc="evaluating", unit="image", disable=jax.process_index() != 0
    ) as bar:
        for shard, shard_arrays in interruptible(zip(missing, extract(missing))):
            collected.write(shard, shard_arrays)
            bar.update(shard.n)
    partitioning.sync(path)
    arrays = collected.read()
    # The first process removes the shards only after all processes have read them.
    partitioning.sync(f"read {path}")
    protocol["n"] = len(arrays["labels"])  # less than evaluate.n if images are unreadable
    scores = sample_scores.compute_scores(c, judge, arrays, labeled=labeled) | extra_scores()
    result: dict[str, Any] = {"protocol": protocol, "scores": scores}
    if "seconds" in arrays:
        result["cost"] = _sampling_cost(c, arrays["seconds"])
    if judge.training is not None and protocol["n"] == c.evaluate.n:  # else images and rows have other numbers
        pairs = nearest_pairs.load(c, judge.training.reference, scores["memorized"]["pairs"], read)
        if pairs is not None and jax.process_index() == 0:
            generation.write_png(f"{path.removesuffix('.json')}.png", generation.tile_rows(pairs))
    if jax.process_index() == 0:
        if c.evaluate.keep_features:
            storage.write(held_out_scores.values_path(path), lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
        storage.write_json(path, result)
        collected.remove()
        logging.info("wrote %s", path)
    return result


def _sampling_cost(c: ConfigDict, seconds: np.ndarray) -> dict[str, Any]:
    """Returns the cost of an image. The median over batches ignores the batches that compiled."""
    return flops.image_cost(c, stored_config.guide_config(c)) | {
        "seconds": float(np.median(seconds[:, 0] / seconds[:, 1]))
    }
