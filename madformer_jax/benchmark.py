"""--mode=benchmark: what training, sampling and the input pipeline of a config cost here, measured."""

import functools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax import config as config_lib
from madformer_jax import flops, generate, partitioning, train
from madformer_jax.config import ConfigError
from madformer_jax.data import pipeline
from madformer_jax.models import madformer

PARTS = ("train", "sample", "data")
Figures = dict[str, float]


def run(c: ConfigDict, workdir: str) -> None:
    """Measures the parts in `benchmark.parts`, prints a table, and writes workdir/benchmark.json.

    Latents and labels are random: neither data nor a VAE are needed, and the VAE is no part of what is measured.

    Raises:
      ConfigError: a setting is wrong, or a part is unknown.
    """
    sizes = config_lib.validate(c)
    parts = [name.strip() for name in c.benchmark.parts.split(",") if name.strip()]
    unknown = [name for name in parts if name not in PARTS]
    if unknown or not parts:
        raise ConfigError(f"config.benchmark.parts={c.benchmark.parts!r}: name some of {', '.join(PARTS)}.")
    device = jax.local_devices()[0]
    report: dict[str, Any] = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "attention": madformer.build(c).attention,
        "peak_tflops": flops.peak(c.model.dtype) / 1e12,
        "latent": [sizes.latent, sizes.latent, sizes.channels],
    }
    measure = {"train": training, "sample": sampling, "data": input_pipeline}
    for name in parts:
        logging.info("measuring %s", name)
        report[name] = measure[name](c)
    if jax.process_index():
        return
    path = epath.Path(workdir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    logging.info("wrote %s", path)


def training(c: ConfigDict) -> Figures:
    """Figures of the training step on random latents: all of `train.make_step` but the codec."""
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    sizes, batch = config_lib.sizes(c), c.train.batch
    identity = train.codec.pixel(1)
    s = train.Setup(madformer.build(c), identity, sizes, train.optimizer(c))
    create, abstract = train.create_state(s.model, s.tx, c.seed, mesh)
    out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), partitioning.replicated(mesh))
    step = jax.jit(train.make_step(s, c), donate_argnums=0, out_shardings=out_shardings)
    rng = np.random.default_rng(c.seed)
    rows = batch // jax.process_count()
    local = {
        "image": rng.standard_normal((rows, sizes.latent, sizes.latent, sizes.channels), np.float32),
        "label": rng.integers(0, max(1, c.model.classes), (rows, c.model.text_length), np.int32),
    }
    with partitioning.scope(mesh):
        data = partitioning.global_batch(local, mesh)
        compiled, seconds = _compile(step, abstract, data, identity.params)
        state = create()

        def once() -> None:
            nonlocal state
            state, metrics = compiled(state, data, identity.params)
            jax.block_until_ready((state, metrics))

        times = _time(once, c.benchmark.warmup, c.benchmark.steps)
    return _figures(c, flops.training_step(c, encode=False), times, batch, seconds, compiled)


def sampling(c: ConfigDict) -> Figures:
    """Figures of drawing one batch of `sample.batch` latents with the config's solver."""
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, batch = madformer.build(c), c.sample.batch
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(functools.partial(madformer.init, model), jax.random.key(0))
        shardings = partitioning.shardings(boxed, mesh)
        params = jax.jit(lambda key: nn.meta.unbox(madformer.init(model, key)), out_shardings=shardings)(
            jax.random.key(c.seed)
        )
        draw = generate.make_draw(c, model, lambda _, z: z)
        replicated = partitioning.batch_sharding(mesh)
        numbers, labels = (
            jax.make_array_from_callback(x.shape, replicated, x.__getitem__)
            for x in (np.arange(batch), np.zeros(batch, np.int32))
        )
        compiled, seconds = _compile(draw, params, {}, numbers, labels)
        times = _time(
            lambda: jax.block_until_ready(compiled(params, {}, numbers, labels)),
            min(1, c.benchmark.warmup),
            c.benchmark.steps,
        )
    cost = flops.sampling(c, batch)
    cost = flops.dataclasses.replace(cost, vae=0.0)
    figures = _figures(c, cost, times, batch, seconds, compiled)
    return figures | {"nfe": flops.nfe(c), "seconds_per_image": figures["step_seconds"] / batch}
