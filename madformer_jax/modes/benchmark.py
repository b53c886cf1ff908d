"""--mode=benchmark: measures training, sampling and the input pipeline of a config on this machine.

    python -m madformer_jax.main --config=configs/digits.py --mode=benchmark --workdir=DIR

`modes.sweep` calls `sampling` for budgets in seconds. To add a part, add its function to `run` and the
labels of its figures to `_ROW_FORMATS`.
"""

import dataclasses
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import elastic_depth, seeds
from madformer_jax.config import schema as config_lib
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops
from madformer_jax.data import pipeline
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.runtime import partitioning, storage
from madformer_jax.sampling import codec, generation
from madformer_jax.training import train_step

Figures = dict[str, float]


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures the parts in `benchmark.parts`, prints a table and writes workdir/benchmark.json.

    Training and sampling use random latents. They need neither data nor a VAE, and their figures leave
    the VAE out.

    Returns:
      The content of benchmark.json.

    Raises:
      ConfigError: A setting is wrong, a part is unknown, or the data do not open.
    """
    config_lib.validate(c)
    measure = {"train": training_step, "sample": sampling, "data": input_pipeline}
    parts = [name.strip() for name in c.benchmark.parts.split(",")]
    for name in parts:
        if name not in measure:
            raise ConfigError(f"config.benchmark.parts: {name!r} is not a part: use any of {', '.join(measure)}.")
    report: dict[str, Any] = {
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.device_count(),
        "attention": madformer.build(c).config.attention.name,
        "dtype": c.model.dtype,
        "peak_tflops": flops.peak_rate(c.model.dtype) / 1e12,
    }
    for name in parts:
        logging.info("measuring %s", name)
        report[name] = measure[name](c)
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "benchmark.json"
        with storage.wrap_errors(f"{path} cannot be written"):
            storage.write_json(path, report)
        print(format_report(report))
        logging.info("wrote %s", path)
    return report


class Program(NamedTuple):
    """A compiled program on random latents."""

    run: Callable[[], Any]  # runs it once and waits for its outputs
    compiled: Any  # `jax.stages.Compiled`
    compile_seconds: float  # near 0 if the compilation cache has the program
    batch: int  # images of a run
    cost: flops.Cost  # of a run


def training_step(c: ConfigDict) -> Figures:
    """Measures the training step with optimizer and averages, at the model's own D."""
    return _measure(training_program(c), c)


def training_program(c: ConfigDict) -> Program:
    """Compiles the training step with optimizer and averages, at the model's own D."""
    c = elastic_depth.with_depth(c, c.model.diffusion_depth)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    sizes, batch = derive_sizes(c), c.train.batch
    identity = codec.Codec(dict, lambda params, batch, key: batch["latent"], lambda params, z: z)
    s = train_step.Setup(madformer.build(c), identity, sizes, train_step.optimizer(c))
    create, abstract = train_step.create_state(s.model, s.tx, seeds.of(c, "init"), mesh, c.train.ema_snapshots > 0)
    out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), partitioning.replicated(mesh))
    step = jax.jit(train_step.make_step(s, c), donate_argnums=0, out_shardings=out_shardings)
    rng, seed = np.random.default_rng(c.seed), np.uint32(seeds.of(c, "data"))
    _, shares = partitioning.batch_share(mesh, batch, c.train.accumulate)
    rows = batch // shares
    local = {
        "latent": rng.standard_normal((rows, sizes.latent, sizes.latent, sizes.channels), np.float32),
        "label": rng.integers(0, max(1, c.model.classes), rows, np.int32),
    }
    if c.text.vocabulary:
        local["tokens"] = rng.integers(0, c.text.vocabulary, (rows, c.text.length), np.int32)
        local["lengths"] = np.full(rows, c.text.length, np.int32)
    with partitioning.scope(mesh):
        data = partitioning.global_batch(local, mesh)
        compiled, seconds = _compile(step, abstract, data, {}, seed)
        state = create()

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, data, {}, seed)
        jax.block_until_ready((state, metrics))

    return Program(run, compiled, seconds, batch, flops.training_step(c, encode=False))


def sampling(c: ConfigDict) -> Figures:
    """Measures sampling a batch of latents: `sample.batch`, rounded up to a multiple of the devices."""
    program = sampling_program(c)
    figures = _measure(program, c)
    counts = {"nfe": flops.nfe(c), "passes": flops.model_passes(c), "batch": program.batch}
    return figures | counts | {"seconds_per_image": figures["seconds"] / program.batch}


def sampling_program(c: ConfigDict) -> Program:
    """Compiles the sampling of a batch of latents, at `sample.diffusion_depth`."""
    c = elastic_depth.with_depth(c, elastic_depth.sampled_depth(c))
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, batch = madformer.build(c), generation.batch_size(c, mesh, c.sample.batch)
    init = functools.partial(madformer.init, model)
    sharding = partitioning.batch_sharding(mesh)
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(init, jax.random.key(0))
    shardings = partitioning.shardings(boxed, mesh)
    with partitioning.scope(mesh):
        params = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(
            jax.random.key(seeds.of(c, "init"))
        )
        labels, length = np.zeros(batch, np.int32), c.text.length
        texts = TokenizedTexts(np.zeros((batch, length), np.int32), labels + length) if c.text.vocabulary else None
        numbers, labels, texts = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), (np.arange(batch), labels, texts)
        )
        inputs = generation.make_inputs(c, numbers, labels, text=texts)
        compiled, seconds = _compile(generation.make_sample_fn(c, model, lambda _, z: z), params, {}, inputs)
    cost = dataclasses.replace(flops.sampling(c, batch), vae=0.0)
    return Program(lambda: jax.block_until_ready(compiled(params, {}, inputs)), compiled, seconds, batch, cost)


def input_pipeline(c: ConfigDict) -> Figures:
    """Measures the seconds to read and preprocess this process's share of a batch."""
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    share, shares = partitioning.batch_share(mesh, c.train.batch)
    batch = c.train.batch // shares
    data = pipeline.train_iterator(c, batch=batch, process_index=share, process_count=shares)
    for _ in range(_BATCHES_READ_AHEAD):  # batches that were read ahead would look too fast
        next(data)
    began = time.perf_counter()
    for _ in range(_BATCHES_TIMED):
        next(data)
    seconds = (time.perf_counter() - began) / _BATCHES_TIMED
    data.close()
    return {"seconds": seconds, "images_per_second": batch / seconds}


_BATCHES_READ_AHEAD, _BATCHES_TIMED = 10, 50


def _compile(function: Any, *args: Any) -> tuple[Any, float]:
    """Returns the compiled program and the seconds of compilation."""
    began = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - began


def _measure(program: Program, c: ConfigDict) -> Figures:
    """Computes figures of a program from the median seconds of `benchmark.steps` runs after `benchmark.warmup` runs."""
    times = []
    for _ in range(c.benchmark.warmup + c.benchmark.steps):
        began = time.perf_counter()
        program.run()
        times.append(time.perf_counter() - began)
    seconds, tflop = statistics.median(times[c.benchmark.warmup :]), program.cost.total / 1e12
    m = program.compiled.memory_analysis()
    # of one device: inputs, outputs without those that reuse donated inputs, and temporaries
    bytes_needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "compile_seconds": program.compile_seconds,
        "seconds": seconds,
        "images_per_second": program.batch / seconds,
        "tflop": tflop,
        "tflops": tflop / seconds,
        "mfu": flops.mfu(program.cost, seconds, jax.device_count(), c.model.dtype),
        "program_gib": bytes_needed / 2**30,
        "process_gib": peak_bytes / 2**30,  # peak resident memory of this process so far
    }


_ROW_FORMATS = {  # figure -> (label, format)
    "compile_seconds": ("compile time", "{:.1f} s"),
    "seconds": ("time of a step or batch", "{:.4g} s"),
    "seconds_per_image": ("per image", "{:.4g} s"),
    "images_per_second": ("images/s", "{:.4g}"),
    "nfe": ("NFE per image", "{:.4g}"),
    "passes": ("passes per image", "{:.4g}"),
    "tflop": ("TFLOP per step or batch", "{:.4g}"),
    "tflops": ("TFLOP/s", "{:.4g}"),
    "mfu": ("MFU", "{:.1%}"),
    "program_gib": ("program memory", "{:.2f} GiB"),
    "process_gib": ("peak process memory", "{:.2f} GiB"),
}


def format_report(report: dict[str, Any]) -> str:
    """Formats the report of `run` as text."""
    head = "{devices} x {device}, {dtype}, attention {attention}, peak {peak_tflops:.4g} TFLOP/s per device"
    parts = [name for name, figures in report.items() if isinstance(figures, dict)]
    lines = [head.format(**report), " " * 28 + "".join(f"{name:>14}" for name in parts)]
    for figure, (name, form) in _ROW_FORMATS.items():
        cells = [form.format(report[workload][figure]) if figure in report[workload] else "" for workload in parts]
        if any(cells):
            lines.append(f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
