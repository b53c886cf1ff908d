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

from madformer_jax import class_labels, codec, drawing, flops, progress, prompts
from madformer_jax import config as config_lib
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import images, judge, likelihood, parts, places, reference, samples, settings
from madformer_jax.models import madformer
from madformer_jax.runtime import checkpoint, memory, partitioning, storage
from madformer_jax.runtime.preemption import interruptible
from madformer_jax.weights.fingerprint import fingerprint

DRAWN = (
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
)  # of `sample`: what decides images

Look = Callable[[Sequence[parts.Part]], Iterator[parts.Arrays]]


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Scores what the config names, writes a file for each result, prints the table, and returns the results.

    Raises:
      ConfigError: a setting, the reference, the images or a checkpoint is wrong or missing; nothing is drawn then.
    """
    check(c)
    if c.evaluate.images:
        results = [_judge_images(c, workdir, samples.open_judge(c, workdir, c.evaluate.n))]
    else:
        results = _judge_checkpoints(c, workdir)
    if jax.process_index() == 0:
        print(judge.table([*results, *judge.means(results)]))
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
    for setting in settings.grid(c):
        config_lib.validate(setting)


def check_early(c: ConfigDict, workdir: str) -> None:
    """As `check`, before the model is trained that will be judged: its data, and a reference that is there by then, are opened.

    Raises:
      ConfigError: as `check`, the data are no images, or the reference or its network does not open.
    """
    check(c)
    images.of_source(c, "train", shuffled=False, asked="train.judge")
    if epath.Path(places.reference_path(c, workdir)).exists():
        samples.open_judge(c, workdir, c.evaluate.n)


def _judge_images(c: ConfigDict, workdir: str, by: samples.Judge) -> dict[str, Any]:
    data = images.open_images(c)
    if data.n < c.evaluate.n:
        raise ConfigError(f"config.evaluate.n={c.evaluate.n}: there are only {data.n} images in {c.evaluate.images}.")

    look = functools.partial(images.look, data, by.extract, images.Unread(c.evaluate.n, c.data.max_corrupt))
    return _result(c, workdir, by, data.about, parts.images_at_once(c), look, labelled=data.labelled)


def _judge_checkpoints(c: ConfigDict, workdir: str) -> list[dict[str, Any]]:
    """A result for each checkpoint and setting, in this order."""
    grid = settings.grid(c)
    settings.warn(c, grid)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.OF_THE_MODEL)
    by = samples.open_judge(c, workdir, c.evaluate.n)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, images_codec = madformer.build(c), codec.build(c)
    target = drawing.abstract_params(model, mesh)
    memory.require("evaluation", mesh, parameters=target)
    noise = drawing.noise_digest(grid[0])  # of all settings
    programs: dict[Any, drawing.Draw] = {}
    results: dict[tuple[int, int], dict[str, Any]] = {}
    with partitioning.scope(mesh), checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        steps = settings.steps(c.evaluate.checkpoints, checkpoints.steps)
        codec_params = jax.device_put(images_codec.load(), partitioning.replicated(mesh))
        decoded = {"codec": codec.describe(c, fingerprint(codec_params, mesh))} if codec_params else {}
        for step, weights in itertools.product(steps, sorted({setting.sample.weights for setting in grid})):
            _, params = checkpoints.restore_weights(weights, target, step)
            about = {"step": step, "fingerprint": fingerprint(params, mesh), "seed": c.seed} | decoded
            for i, setting in enumerate(grid):
                if setting.sample.weights != weights:
                    continue
                likely = functools.partial(likelihood.scores, setting, model, params, mesh)
                names = checkpoints.class_names(step)
                config_lib.number_labels(setting, names)
                s = setting.sample
                chosen = class_labels.numbers_text(s.labels)
                if chosen:
                    logging.info(
                        "classes of the images of step %d: %s",
                        step,
                        class_labels.summary(config_lib.labels(setting), names),
                    )
                drawn = json.loads(s.to_json()) | {"noise": noise or "", "labels": chosen}  # as a file has it
                program = (s.solver, s.spacing, s.steps, s.guidance == 1.0)
                if program not in programs:
                    drawn_by = drawing.make_draw(setting, model, images_codec.decode)
                    programs[program] = progress.compiling(drawn_by, f"the sampling program of {s.steps} steps")
                draw = functools.partial(
                    drawing.batches, setting, programs[program], params, codec_params, mesh, most=s.n
                )
                size = drawing.batch_size(setting, mesh)
                results[step, i] = _result(
                    setting, workdir, by, about | {name: drawn[name] for name in DRAWN} | prompts.describe(setting),
                    size * -(-parts.AT_ONCE // size),
                    functools.partial(map, functools.partial(_draw_and_look, draw, by)), labelled=bool(c.model.classes),
                    more=likely,
                )  # fmt: skip
    return [results[step, i] for step in steps for i in range(len(grid))]


def _draw_and_look(
    draw: Callable[[range], Iterator[drawing.Drawn]], by: samples.Judge, part: parts.Part
) -> parts.Arrays:
    return samples.look(interruptible(draw(range(part.first, part.stop))), by.extract, by.reader)


def _result(
    c: ConfigDict,
    workdir: str,
    by: samples.Judge,
    about: Mapping[str, Any],
    size: int,
    look: Look,
    *,
    labelled: bool,
    more: Callable[[], dict[str, judge.Score]] = dict,
) -> dict[str, Any]:
    """The result of one set of images, which `about` tells of: read from its file, or made part by part, with `more` scores."""
    protocol = {**by.protocol, "images": dict(about)}
    if by.training is not None:
        protocol["training"] = reference.load(c.evaluate.training).digest
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    path = os.path.join(workdir, "evaluations", f"{key}.json")
    there = storage.read_json(path)
    if there is not None:
        logging.info("%s is there already", path)
        if "cost" in there:  # what follows from the config, as this version counts it
            there["cost"] |= flops.image_cost(c)
        return there
    collected = parts.Parts(epath.Path(workdir) / "evaluations" / key, c.evaluate.n, size)
    missing = collected.missing()
    with tqdm(
        total=sum(p.n for p in missing), desc="evaluating", unit="image", disable=jax.process_index() != 0
    ) as bar:
        for part, arrays in interruptible(zip(missing, look(missing))):
            collected.write(part, arrays)
            bar.update(part.n)
    partitioning.sync(key)
    found = collected.read()
    partitioning.sync(f"read {key}")  # before the first process removes the parts
    protocol["n"] = len(found["labels"])  # less than evaluate.n where images cannot be read
    result = {"protocol": protocol, "scores": samples.scores(c, by, found, labelled=labelled) | more()}
    if "seconds" in found:
        result["cost"] = _cost(c, found["seconds"])
    if jax.process_index() == 0:
        storage.write_json(path, result)
        collected.remove()
        logging.info("wrote %s", path)
    return result


def _cost(c: ConfigDict, seconds: np.ndarray) -> dict[str, Any]:
    """What an image costs; the median over batches leaves out those that compiled."""
    return flops.image_cost(c) | {"seconds": float(np.median(seconds[:, 0] / seconds[:, 1]))}
