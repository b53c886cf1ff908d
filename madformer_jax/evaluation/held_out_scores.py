"""Scores of trained models on held-out images: losses, bits per dimension, and both by block.

    python -m madformer_jax.main --workdir=DIR --mode=evaluate --config.evaluate.held_out_n=1000

`modes.evaluate` calls `run`. The scores need no samples and no reference, except those by block. Each
checkpoint has a file workdir/evaluations/held_out/<hash of its protocol>.json with the scores, and beside it
a .npz with the value of each image. All models have the same images and noise, so the differences of
two models are paired (`paired_differences`).
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import elastic_depth, seeds
from madformer_jax.config.block_orders import sampling_order_name
from madformer_jax.config.shapes import vocabulary_size
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import bits_per_dimension, by_block, held_out_losses, sampling_grid, score_summary, shards
from madformer_jax.evaluation.held_out_images import HeldOutImages
from madformer_jax.evaluation.teacher_forcing import TeacherForcing
from madformer_jax.runtime import checkpoint, partitioning, progress, storage
from madformer_jax.sampling import codec, solving
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.weights.fingerprint import fingerprint

BITS = "bits_per_dimension"
_TARGET_FIELDS = ("loss", "blocks", "prediction_type", "diffusion")  # of a protocol: what the losses measure


def open_images(c: ConfigDict) -> HeldOutImages | None:
    """Opens the held-out images; None if neither `evaluate.held_out_n` nor `evaluate.by_block` asks for them.

    Raises:
      ConfigError: See `HeldOutImages`, `evaluate.images` names existing images, or the scores by block lack
        one order of blocks or one number of solver steps.
    """
    n = c.evaluate.held_out_n or (c.evaluate.n if c.evaluate.by_block else 0)
    if not n:
        return None
    if c.evaluate.images:
        raise ConfigError(
            "config.evaluate.held_out_n and by_block score a model, and evaluate.images names existing images: set one."
        )
    for setting in _settings(c) if c.evaluate.by_block else ():
        if sampling_order_name(setting) == "random":
            raise ConfigError(
                "config.evaluate.by_block=True needs one order of blocks: set config.sample.block_order to one, e.g. raster."
            )
        if not isinstance(solving.solver_steps(setting), int):
            raise ConfigError(
                f"config.evaluate.by_block=True samples all blocks with the same steps, and config.sample.steps_by_block="
                f"{setting.sample.steps_by_block!r}: set config.sample.steps_by_block=constant."
            )
    return HeldOutImages(c, n)


def _settings(c: ConfigDict) -> list[ConfigDict]:
    """Returns the first setting of the grid with each kind of weights, D and order. Only it is scored by block."""
    first = {
        (x.sample.weights, x.sample.ema, elastic_depth.sampled_depth(x), sampling_order_name(x)): x
        for x in reversed(sampling_grid.expand_configs(c))
    }
    return [first[key] for key in sorted(first)]


def run(c: ConfigDict, workdir: str, images: HeldOutImages) -> list[dict[str, Any]]:
    """Returns the result of each checkpoint and each kind of weights, D and order of the grid, computed or read.

    Raises:
      ConfigError: A checkpoint is missing or does not fit, or a value is not finite.
    """
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    steps = sampling_grid.select_checkpoints(c.evaluate.checkpoints, checkpoint.complete_steps(workdir))
    return [
        _load_or_measure(setting, workdir, images, step) for step, setting in itertools.product(steps, _settings(c))
    ]


def _load_or_measure(c: ConfigDict, workdir: str, images: HeldOutImages, step: int) -> dict[str, Any]:
    trained = TrainedModel.open(c, workdir, step, check_memory_for="evaluation")
    with partitioning.scope(trained.mesh):
        codec_params = trained.load_codec_params()
        protocol = _protocol(c, trained, codec_params, images)
        key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
        path = os.path.join(workdir, "evaluations", "held_out", f"{key}.json")
        stored = shards.read_json_object(path, "protocol", "scores")
        if stored is not None:
            logging.info("%s exists already", path)
            return stored
        with progress.log_while(f"scores of {images.n} held-out images"):
            values = _measure(c, trained, codec_params, images)
    _check_finite(values, step)
    result: dict[str, Any] = {"protocol": protocol, "scores": summarize(values)}
    if c.evaluate.by_block:
        result["blocks"] = by_block.table(values)
    if jax.process_index() == 0:
        per_image = {name: x for name, x in values.items() if x.ndim < 3}  # without the sampled blocks
        storage.write(values_path(path), lambda file: np.savez(file, **per_image))  # type: ignore[arg-type]
        storage.write_json(path, result)
        logging.info("wrote %s", path)
    return result


def _measure(c: ConfigDict, trained: TrainedModel, codec_params: Any, images: HeldOutImages) -> dict[str, np.ndarray]:
    trained = trained.with_depth(elastic_depth.sampled_depth(c))
    forward = TeacherForcing(c, trained.network, trained.params, trained.mesh)
    batches = functools.partial(images.batches, c, trained, codec_params)
    values = held_out_losses.measure(c, forward, batches())
    values |= bits_per_dimension.measure(forward, batches)
    if c.evaluate.by_block:
        values |= by_block.measure(c, trained, codec_params, images, forward)
    return values


def _protocol(c: ConfigDict, trained: TrainedModel, codec_params: Any, images: HeldOutImages) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "images": images.protocol,
        "space": "8-bit pixels" if c.codec.name == "pixel" else "latents, scaled as the model reads them (a density)",
        "bound": {**bits_per_dimension.SETTINGS, "clip_x0": c.sample.clip_x0},
        "loss": c.loss.to_dict(),
        "step": trained.step,
        "weights": c.sample.weights,
        "ema": c.sample.ema,
        "fingerprint": fingerprint(trained.params, trained.mesh),
        "blocks": c.model.blocks,
        "prediction_type": c.model.prediction_type,
        **solving.path_protocol(c),
        **({"block_order": order} if (order := sampling_order_name(c)) != "raster" else {}),
    }
    if c.sample.diffusion_depth:
        protocol["diffusion_depth"] = c.sample.diffusion_depth
    if codec_params:
        protocol["codec"] = codec.describe(c, fingerprint(codec_params, trained.mesh))
    if c.evaluate.by_block:
        protocol["by_block"] = {
            "solver": c.sample.solver,
            "spacing": c.sample.spacing,
            "steps": solving.solver_steps(c),
            "seed": seeds.of(c, "sample"),
            "other": "image of the same label" if vocabulary_size(c) else "image",
            **({"context_noise": c.sample.context_noise, "of": "all contexts"} if c.sample.context_noise else {}),
        }
    return protocol


def summarize(values: Mapping[str, np.ndarray]) -> dict[str, score_summary.Score]:
    """Returns the scores of per-image values: bits per dimension, and losses with the prefix "held_out_".

    A score has its mean as `value`, a 95 % bootstrap interval over images, the standard error and n.
    """
    scores = {}
    for name, x in values.items():
        if name.startswith((BITS, "loss_")):
            scores[name if name.startswith(BITS) else f"held_out_{name}"] = score_summary.mean_score(x)
    return scores


def _check_finite(values: Mapping[str, np.ndarray], step: int) -> None:
    for name, x in values.items():
        if not np.isfinite(x).all():
            number = int(np.argwhere(~np.isfinite(x))[0][0])
            raise ConfigError(
                f"{name} of held-out image {number} is not finite at step {step}: the weights may have diverged. Try an "
                "earlier checkpoint with config.evaluate.checkpoints."
            )


def values_path(path: str) -> str:
    """Returns the path of the values of each image that belong to a result file."""
    return os.path.splitext(path)[0] + ".npz"


def paired_differences(path: str, baseline: str) -> dict[str, score_summary.Score]:
    """Computes the differences of two models, image by image.

    Args:
      path: Result file of a model, evaluations/held_out/<hash>.json.
      baseline: Result file of the model that is subtracted.

    Returns:
      The mean difference of each score that measures the same for both, with a 95 % interval over images.

    Raises:
      ConfigError: The files do not exist, or their images, noise or spaces differ.
    """
    results, arrays = [], []
    for file in (path, baseline):
        result = storage.read_json_object(file, "protocol", "scores")
        if result is None:
            raise ConfigError(f"{file} does not exist: make it with --mode=evaluate and config.evaluate.held_out_n.")
        results.append(result)
        with (
            storage.wrap_errors(f"{values_path(file)} cannot be read"),
            epath.Path(values_path(file)).open("rb") as content,
            np.load(content, allow_pickle=False) as values,
        ):
            arrays.append({name: values[name] for name in values.files})
    a, b = (result["protocol"] for result in results)
    for field in ("images", "space"):
        if a[field] != b[field]:
            raise ConfigError(
                f"held-out scores of different {field} are not paired: {a[field]!r} against {b[field]!r}."
            )
    same_target = all(a.get(field) == b.get(field) for field in _TARGET_FIELDS)
    comparable = {BITS: a["bound"] == b["bound"], "loss_": same_target}
    prefixes = tuple(prefix for prefix, is_comparable in comparable.items() if is_comparable)
    names = [name for name, x in arrays[0].items() if name.startswith(prefixes) and name in arrays[1] and x.ndim == 1]
    return summarize({name: arrays[0][name] - arrays[1][name] for name in names})


def text_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns Markdown tables: the scores of each result, and those by block."""
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    labels = [_label(result["protocol"]) for result in results]
    rows = [[name, *(score_summary.format_score(x["scores"].get(name)) for x in results)] for name in names]
    tables = [score_summary.markdown_table([["held out", *labels], *rows])]
    tables += [by_block.text_table(result["blocks"]) for result in results if "blocks" in result]
    return "\n\n".join(tables)


def _label(protocol: Mapping[str, Any]) -> str:
    label = f"{protocol['step']}, {protocol['weights']}"
    for name, field in (("EMA width", "ema"), ("D", "diffusion_depth"), ("order", "block_order")):
        label += f", {name} = {protocol[field]}" if protocol.get(field) else ""
    return label


def run_entries(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the entries of a run's result.json: `held_out`, and `held_out_blocks` if there are scores by block.

    The scores are those of one checkpoint, or means over several with their ranges.
    """
    entries = {"held_out": _mean_over_checkpoints([result["scores"] for result in results])}
    if "blocks" in results[0]:
        entries["held_out_blocks"] = _mean_over_checkpoints([result["blocks"] for result in results])
    return entries


def _mean_over_checkpoints(trees: Sequence[Any]) -> Any:
    """Returns a tree of scores, or the means of several. Other leaves are the numbers of blocks."""

    def mean(*leaves: Any) -> Any:
        if not isinstance(leaves[0], dict):
            return leaves[0]
        values = [leaf["value"] for leaf in leaves]
        return {"value": float(np.mean(values)), "low": min(values), "high": max(values)}

    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(mean, *trees, is_leaf=lambda x: isinstance(x, dict) and "value" in x)
