"""--mode=evaluate: scores of a workdir's checkpoints, or of images that exist, against a reference.

    python -m madformer_jax.main --workdir=runs/digits --mode=evaluate --config.evaluate.n=1000

Each setting's result is a file workdir/evaluations/<hash of its protocol>.json; what is there is not computed again, and a
killed run goes on where it was.
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

from madformer_jax.config import aliases, class_labels
from madformer_jax.config import schema as config_lib
from madformer_jax.cost import flops
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images, judge, judge_paths, likelihood, sample_scores, sampling_grid, shards
from madformer_jax.models import madformer
from madformer_jax.modes import reference as reference_mode
from madformer_jax.runtime import checkpoint, memory, partitioning, progress, storage
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.sampling import codec, generation, prompts
from madformer_jax.weights.fingerprint import fingerprint

SAMPLE_PROTOCOL_FIELDS = (
    "weights",
    "solver",
    "spacing",
    "steps",
    "guidance",
    "guidance_schedule",
    "guidance_interval",
    "clip",
    "labels",
    "label_sampling",
    "noise",
)  # of `sample`, by the names that they had first: what decides images

ShardExtractor = Callable[[Sequence[shards.Shard]], Iterator[shards.Arrays]]


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Scores what the config names, writes a file for each result, prints the table, and returns the results.

    Raises:
      ConfigError: a setting, the reference, the images or a checkpoint is wrong or missing; nothing is drawn then.
    """
    check(c)
    if c.evaluate.images:
        results = [_judge_images(c, workdir, sample_scores.open_judge(c, workdir, c.evaluate.n))]
    else:
        results = _judge_checkpoints(c, workdir)
    if jax.process_index() == 0:
        print(judge.comparison_table([*results, *judge.mean_over_checkpoints(results)]))
    return {"results": results}


def check(c: ConfigDict) -> None:
    """Refuses what can be seen to be wrong before there is anything to judge.

    Raises:
      ConfigError: a setting of the config or of its grid cannot be, or is of the other kind of images and would be passed over.
    """
    config_lib.validate(c)
    if c.evaluate.degrade and not c.evaluate.images:
        raise ConfigError("config.evaluate.degrade spoils images that exist: name them in evaluate.images.")
    if c.evaluate.grid and c.evaluate.images:
        raise ConfigError(
            "config.evaluate.grid draws from checkpoints, and evaluate.images are there already: set one."
        )
    for setting in sampling_grid.expand_configs(c):
        config_lib.validate(setting)


def check_before_training(c: ConfigDict, workdir: str) -> None:
    """Refuses, before a model is trained, what `train.judge` would end in when it is.

    Raises:
      ConfigError: As `check`. The reference or its network can neither be opened nor made. There are fewer images than are
        judged. The noise or a prompt of a setting does not fit.
    """
    check(c)
    training = images.from_source(c, "train", shuffled=False, asked="train.judge")
    if training.n < c.evaluate.n:
        raise ConfigError(
            f"config.evaluate.n={c.evaluate.n}: train.judge judges as many real images of split 'train', and there are only "
            f"{training.n}: set a smaller config.evaluate.n."
        )
    if epath.Path(judge_paths.reference_path(c, workdir)).exists():
        sample_scores.open_judge(c, workdir, c.evaluate.n)
    else:
        judge.check_counts(c.evaluate.n, reference_mode.check(c, workdir).n)
        if c.evaluate.training:
            sample_scores.open_training(c)
    grid = sampling_grid.expand_configs(c)
    generation.open_noise(grid[0])
    for setting in _unique_prompt_configs(grid).values():
        prompts.tokenize(setting)
    likelihood.check(c)


def _judge_images(c: ConfigDict, workdir: str, by: sample_scores.Judge) -> dict[str, Any]:
    data = images.open_images(c)
    if data.n < c.evaluate.n:
        raise ConfigError(f"config.evaluate.n={c.evaluate.n}: there are only {data.n} images in {c.evaluate.images}.")

    look = functools.partial(
        images.extract_missing_shards, data, by.extract, images.UnreadableImages(c.evaluate.n, c.data.max_corrupt)
    )
    about = data.about | {"content": data.digest(c.evaluate.n), "labelled": bool(data.classes)}
    return _load_or_make_result(c, workdir, by, about, shards.read_batch_size(c), look, labelled=bool(data.classes))


def _judge_checkpoints(c: ConfigDict, workdir: str) -> list[dict[str, Any]]:
    """A result for each checkpoint and setting, in this order."""
    grid = sampling_grid.expand_configs(c)
    sampling_grid.log_warnings(c, grid)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    by = sample_scores.open_judge(c, workdir, c.evaluate.n)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, images_codec = madformer.build(c), codec.build(c)
    target = generation.abstract_params(model, mesh)
    memory.check_state_fits("evaluation", mesh, parameters=target)
    noise = generation.open_noise(grid[0])  # of all settings
    digest = generation.hash_noise(noise) or ""
    texts = {asked: prompts.tokenize(setting) for asked, setting in _unique_prompt_configs(grid).items()}
    described = {
        asked: prompts.describe(setting, texts[asked]) for asked, setting in _unique_prompt_configs(grid).items()
    }
    captions = likelihood.open_captions(c)
    declared = {} if captions is None else {"bits": captions.protocol}
    programs: dict[Any, generation.SampleFn] = {}
    results: dict[tuple[int, int], dict[str, Any]] = {}
    with partitioning.scope(mesh), checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        steps = sampling_grid.select_checkpoints(c.evaluate.checkpoints, checkpoints.steps)
        codec_params = jax.device_put(images_codec.load(), partitioning.replicated(mesh))
        decoded = {"codec": codec.describe(c, fingerprint(codec_params, mesh))} if codec_params else {}
        for step, weights in itertools.product(steps, sorted({setting.sample.weights for setting in grid})):
            _, params = checkpoints.restore_weights(weights, target, step)
            text.check_tokenizer_identity(c, checkpoints.meta(step), step, workdir)
            about = {"step": step, "fingerprint": fingerprint(params, mesh), "seed": c.seed} | decoded
            # The captions' scores depend on the weights alone.
            likely = functools.cache(functools.partial(captions.scores, model, params, mesh)) if captions else dict
            for i, setting in enumerate(grid):
                if setting.sample.weights != weights:
                    continue
                names = checkpoints.class_names(step)
                config_lib.resolve_label_numbers(setting, names)
                s = setting.sample
                given = generation.SampleConditions(generation.read_labels(setting), noise, texts[s.prompts])
                chosen = class_labels.format_numbers(s.labels)
                if chosen:
                    logging.info(
                        "classes of the images of step %d: %s",
                        step,
                        class_labels.summary(config_lib.sample_labels(setting), names),
                    )
                drawn = aliases.first_names(json.loads(s.to_json()), "sample.") | {
                    "noise": digest,
                    "labels": chosen,
                }  # as a file has it
                program = (s.solver, s.spacing, s.steps, s.guidance == 1.0)
                if program not in programs:
                    drawn_by = generation.make_sample_fn(setting, model, images_codec.decode)
                    programs[program] = progress.log_compilation(drawn_by, f"the sampling program of {s.steps} steps")
                draw = functools.partial(
                    generation.batches, setting, programs[program], params, codec_params, mesh, most=s.n, given=given
                )
                size = generation.batch_size(setting, mesh)
                results[step, i] = _load_or_make_result(
                    setting, workdir, by, about | {name: drawn[name] for name in SAMPLE_PROTOCOL_FIELDS} | described[s.prompts],
                    size * -(-shards.MAX_BATCH // size),
                    functools.partial(map, functools.partial(_sample_and_extract, draw, by)), labelled=bool(c.model.classes),
                    more=likely, declared=declared,
                )  # fmt: skip
    return [results[step, i] for step in steps for i in range(len(grid))]


def _unique_prompt_configs(grid: Sequence[ConfigDict]) -> dict[str, ConfigDict]:
    """One of the settings for each value of `sample.prompts`."""
    return {setting.sample.prompts: setting for setting in grid}


def _sample_and_extract(
    draw: Callable[[range], Iterator[generation.SampleBatch]], by: sample_scores.Judge, part: shards.Shard
) -> shards.Arrays:
    return sample_scores.extract_features(interruptible(draw(range(part.first, part.stop))), by.extract, by.reader)


def _load_or_make_result(
    c: ConfigDict,
    workdir: str,
    by: sample_scores.Judge,
    about: Mapping[str, Any],
    size: int,
    look: ShardExtractor,
    *,
    labelled: bool,
    more: Callable[[], dict[str, judge.Score]] = dict,
    declared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the result of one set of images: read from its file, or made part by part.

    Args:
      about: What identifies the images.
      more: Computes further scores.
      declared: What identifies the inputs of those.
    """
    protocol = {**by.protocol, **(declared or {}), "images": dict(about)}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    path = os.path.join(workdir, "evaluations", f"{key}.json")
    stored = _load_result(c, path)
    if stored is not None:
        logging.info("%s is there already", path)
        return stored
    folder = epath.Path(workdir) / "evaluations" / key
    with shards.exclusive_lock(folder):
        stored = _load_result(c, path)  # another process may have written it meanwhile
        if stored is not None:
            return stored
        return _make_result(c, path, protocol, shards.Shards(folder, c.evaluate.n, size), by, look, labelled, more)


def _load_result(c: ConfigDict, path: str) -> dict[str, Any] | None:
    """Reads a result, with what follows from the config as this version counts it; None if there is none."""
    result = shards.read_json(path)
    if result is not None and "cost" in result:
        result["cost"] |= flops.image_cost(c)
    return result


def _make_result(
    c: ConfigDict,
    path: str,
    protocol: dict[str, Any],
    collected: shards.Shards,
    by: sample_scores.Judge,
    look: ShardExtractor,
    labelled: bool,
    more: Callable[[], dict[str, judge.Score]],
) -> dict[str, Any]:
    """Looks at the missing parts, and writes the result."""
    missing = collected.missing()
    with tqdm(
        total=sum(p.n for p in missing), desc="evaluating", unit="image", disable=jax.process_index() != 0
    ) as bar:
        for part, arrays in interruptible(zip(missing, look(missing))):
            collected.write(part, arrays)
            bar.update(part.n)
    partitioning.sync(path)
    found = collected.read()
    partitioning.sync(f"read {path}")  # before the first process removes the parts
    protocol["n"] = len(found["labels"])  # less than evaluate.n where images cannot be read
    result = {"protocol": protocol, "scores": sample_scores.compute_scores(c, by, found, labelled=labelled) | more()}
    if "seconds" in found:
        result["cost"] = _sampling_cost(c, found["seconds"])
    if jax.process_index() == 0:
        storage.write_json(path, result)
        collected.remove()
        logging.info("wrote %s", path)
    return result


def _sampling_cost(c: ConfigDict, seconds: np.ndarray) -> dict[str, Any]:
    """What an image costs; the median over batches leaves out those that compiled."""
    return flops.image_cost(c) | {"seconds": float(np.median(seconds[:, 0] / seconds[:, 1]))}
