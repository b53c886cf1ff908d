"""--mode=probe: shows which layers of a trained model could run once per block, and suggests D.

    python -m madformer_jax.main --mode=probe --workdir=runs/digits

Writes workdir/probe/index.html, a page without scripts, and workdir/probe/probe.json. The model is that
of `sample.step` and `sample.weights`, and the images are those of `evaluate.split`.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import elastic_depth, seeds
from madformer_jax.config import schema as config_lib
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import pipeline
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import context_loss, split_probe
from madformer_jax.reports import probe_page
from madformer_jax.runtime import checkpoint, partitioning, progress, storage
from madformer_jax.sampling import codec
from madformer_jax.sampling.opening import TrainedModel

_STREAM = 1 << 30  # folded into the seed's key before a batch number, apart from training steps


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures the layers on `probe.n` images and writes the page.

    Returns:
      The path of the page and the suggested D.

    Raises:
      ConfigError: A setting is wrong, the model has no AR condition or a block order other than raster, or the workdir has no model.
    """
    config_lib.validate(c)
    m, p = c.model, c.probe
    if jax.process_count() > 1:
        raise ConfigError("--mode=probe is for one process: start it without --distributed and --coordinator.")
    if not m.ar_condition and m.diffusion_depth < m.depth:
        raise ConfigError(
            "config.model.ar_condition=False: the diffusion layers read nothing of the AR layers, so that there is no cut to "
            "suggest."
        )
    if m.block_order != "raster":
        raise ConfigError(
            f"config.model.block_order={m.block_order!r}: --mode=probe reads models of raster order only."
        )
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    trained = TrainedModel.open(c, workdir)
    depth = elastic_depth.sampled_depth(c)
    path = schedules.make(**c.diffusion)
    with (
        partitioning.scope(trained.mesh),
        contextlib.closing(_Images(c, trained)) as images,
        progress.log_while("probing"),
    ):
        cut = trained.with_depth(depth)
        batches = list(images)
        measures = split_probe.measure(cut.network, cut.params, batches, path, "trailing", p.steps)
        block_losses = context_loss.losses_by_block(
            cut.network, cut.params, batches, path, c.train.own_context_timestep
        )
    suggested = split_probe.suggest_depth(measures.reuse_loss, m.depth, p.tolerance)
    result = {
        "step": trained.step, "diffusion_depth": depth, "suggested_depth": suggested, "tolerance": p.tolerance,
        "n": images.n, "split": c.evaluate.split, "reuse_loss": {str(k): v for k, v in measures.reuse_loss.items()},
        "loss_by_block": {name: x.tolist() for name, x in block_losses._asdict().items()},
        **{name: getattr(measures, name).tolist() for name in ("timesteps", "to_first", "to_previous", "masses")},
    }  # fmt: skip
    folder = os.path.join(workdir, "probe")
    storage.write_json(os.path.join(folder, "probe.json"), result)
    page = os.path.join(folder, "index.html")
    storage.write_text(page, _render(c, measures, block_losses, suggested, result))
    logging.info("suggested D: %d of %d layers (now %d); wrote %s", suggested, m.depth, depth, page)
    return {"page": page, "suggested_depth": suggested}


class _Images:
    """Batches of latents of `evaluate.split`."""

    def __init__(self, c: ConfigDict, trained: TrainedModel):
        self._c = c.copy_and_resolve_references()
        self._c.data.split, self._c.data.flip, self._c.data.workers = c.evaluate.split, False, 0
        self._trained = trained
        devices = partitioning.batch_devices(trained.mesh)
        self._batch = math.ceil(min(c.probe.batch, c.probe.n) / devices) * devices
        self.n = math.ceil(c.probe.n / self._batch) * self._batch
        self._data = pipeline.train_iterator(self._c, batch=self._batch, validation=True)

    def __iter__(self) -> Iterator[split_probe.Batch]:
        c, trained, sizes = self._c, self._trained, derive_sizes(self._c)
        info = pipeline.dataset_info(c)
        codec_params = trained.load_codec_params() if info.kind == "images" else {}
        key = jax.random.fold_in(jax.random.key(seeds.of(c, "data")), _STREAM)
        encode = jax.jit(lambda params, rows, key: codec.to_blocks(trained.codec.encode(params, rows, key), sizes))
        for i in range(self.n // self._batch):
            rows = partitioning.global_batch(next(self._data), trained.mesh)
            noise_key, encode_key = jax.random.split(jax.random.fold_in(key, i))
            tokens = rows.get("tokens", rows["label"][:, None]) if trained.network.config.vocabulary else None
            yield split_probe.Batch(encode(codec_params, rows, encode_key), tokens, rows.get("lengths"), noise_key)

    def close(self) -> None:
        self._data.close()


def _render(
    c: ConfigDict,
    measures: split_probe.Measures,
    block_losses: context_loss.BlockLosses,
    suggested: int,
    result: dict[str, Any],
) -> str:
    m = c.model
    similarity = {
        "to first step": measures.to_first[:, 1:].mean(axis=1).tolist(),
        "to step before": measures.to_previous.mean(axis=1).tolist(),
    }
    shown = {"earlier blocks": m.blocks > 1, "own block": True, "text": c.text.vocabulary or m.classes}
    description = (
        f"A model of N = {m.depth} layers with D = {result['diffusion_depth']} diffusion layers and L = {m.blocks} blocks, at "
        f"step {result['step']}. The layers are compared at the noise levels of {c.probe.steps} solver steps, on "
        f"{result['n']} images of split {c.evaluate.split!r}."
    )
    masses = {name: measures.masses[:, i].tolist() for i, name in enumerate(shown) if shown[name]}
    by_block = block_losses.true.tolist(), block_losses.estimated.tolist()
    return probe_page.render(
        similarity, masses, measures.reuse_loss, by_block, suggested, c.probe.tolerance, description
    )
