"""--mode=compile: memory, estimated time or work of a config on TPUs or GPUs, without the devices.

    python -m madformer_jax.main --mode=compile --topology=v5e:4x4 --config=configs/ffhq1024.py

Compiles the training step and the sampler ahead of time; nothing is run and no array is made. libtpu
(the extra `aot`) compiles for any TPU topology that it knows, and `cost.tpu_time` estimates the time.
JAX's CUDA plugin compiles for h100, h200 or h100:8 without autotuning, which needs the device. For
GPUs `cost.gpu_work` counts kernels, bytes and FLOPs in place of a time. The limit is what the
compiler reports for a TPU, and the share of memory that JAX allocates on a GPU. Exit status 1 means
that a program does not fit. With a workdir, all figures also go to its compile.json.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.config import elastic_depth, fields, seeds
from madformer_jax.config import schema as config_lib
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops, gpu_work, hlo, topologies, tpu_time
from madformer_jax.data import sources
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.models import layer_split, madformer, vae
from madformer_jax.runtime import partitioning, storage
from madformer_jax.sampling import codec, generation
from madformer_jax.training import train_step

GIB = 2**30
Estimator = Callable[[str], tpu_time.Estimate]  # HLO text of a compiled program -> its time


class ProgramReport(NamedTuple):
    """Figures of a compiled program, per device."""

    seconds: float  # of compilation
    quick_compile: bool  # compiled at XLA's level O1, unlike in a run
    inputs: dict[str, int]  # bytes of each kind of input, from the shardings
    memory: dict[str, int]  # bytes of the compiled program by kind; empty if the compiler refused the program
    required_bytes: int  # in total
    limit_bytes: int  # that a program may use
    cost: flops.Cost  # analytic FLOPs of all devices
    xla_flops: float  # of one device; the body of a loop counts once
    collectives: list[hlo.Collective]  # communication between devices
    time: tpu_time.Estimate | None = None  # if estimated
    kernels: dict[str, int] | None = None  # number of library calls and hand-written kernels, by name
    work: gpu_work.Work | None = None  # kernels, bytes and FLOPs of a program for a GPU

    @property
    def compiled(self) -> bool:
        return bool(self.memory)

    @property
    def fits(self) -> bool:
        # The TPU compiler refuses programs that are too large, the GPU compiler does not.
        return self.compiled and self.required_bytes <= self.limit_bytes


def run(c: ConfigDict, workdir: str | None, topology: str) -> dict[str, Any]:
    """Compiles the training step and the sampler for a topology, such as "v5e:4x4" or "h100:8", and prints reports.

    Returns:
      For each program its bytes, seconds of compilation and estimated time (None if not estimated),
      and under "fits" whether both fit.

    Raises:
      ConfigError: A setting is wrong, or the compiler for the topology is missing or does not know it.
    """
    config_lib.validate(c)
    devices, platform = topologies.topology_devices(topology), topologies.platform(topology)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices)
    limit = usable_memory(devices[0]) if platform == "tpu" else topologies.gpu_memory_bytes(topology)
    model = madformer.build(c, platform)
    shape = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(
        f"{topology}: {len(devices)} x {devices[0].device_kind}, mesh {shape}; "
        f"attention {model.config.attention.name}, remat {c.model.remat}, {c.train.accumulate} microbatches per step"
    )
    figures: dict[str, Any] = {"fits": True, "topology": topology, "config": fields.flat(c)}
    for name, build in {"training step": training_step, "sampler": sampling}.items():
        logging.info("compiling the %s", name)
        program = build(c, model, mesh, limit, platform)
        print(format_report(name, program, len(devices)), flush=True)
        figures[name] = {
            "bytes": program.required_bytes, "seconds": program.seconds, "fits": program.fits,
            "time": program.time and program.time.figures(), "kernels": program.kernels,
            "work": program.work and program.work.figures(),
        }  # fmt: skip
        figures["fits"] &= program.fits
    if workdir:
        storage.write_json(f"{workdir}/compile.json", figures)
    return figures


def usable_memory(device: jax.Device) -> int:
    """Returns the bytes of a device that a program may use, from the compiler's out-of-memory error."""
    sharding = partitioning.replicated(Mesh(np.array([device]), ("x",)))
    double = jax.jit(lambda x: 2 * x, in_shardings=sharding, out_shardings=sharding)
    _, refused = _compile(double.lower(jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)), {})
    if refused is None or refused[1] is None:
        raise RuntimeError(f"cannot find out how much memory a {device.device_kind} has: the compiler reports no limit")
    return refused[1]


# ---- the two programs


def training_step(c: ConfigDict, model: madformer.MADFormer, mesh: Mesh, limit: int, platform: str) -> ProgramReport:
    """Compiles the training step, at the model's own D.

    The batch consists of cached latents if the source may hold them and the codec is a VAE, else of images.
    """
    c = elastic_depth.with_depth(c, c.model.diffusion_depth)
    partitioning.check_batch(mesh, c.train.batch, c.train.accumulate)
    images = _abstract_codec(c, mesh)
    s = train_step.Setup(model, images, derive_sizes(c), train_step.optimizer(c))
    _, state = train_step.create_state(s.model, s.tx, seeds.of(c, "init"), mesh, c.train.ema_snapshots > 0)
    batch, latents = _abstract_batch(c, mesh)
    out_shardings = (jax.tree.map(lambda x: x.sharding, state), partitioning.replicated(mesh))
    step = jax.jit(train_step.make_step(s, c, platform), donate_argnums=0, out_shardings=out_shardings)
    inputs = {"parameters": state.params, "averages (EMA)": (state.ema, state.power_ema), "optimizer": state.opt}
    inputs["batch"] = batch
    codec_params = {} if latents else images.load()
    inputs |= {"VAE": codec_params} if codec_params else {}
    args = (state, batch, codec_params, np.uint32(seeds.of(c, "data")))
    cost = flops.training_step(c, encode=not latents)
    with partitioning.scope(mesh):
        return _compile_program(step, args, inputs, cost, limit, _estimator(c, mesh, cost), platform)


def sampling(c: ConfigDict, model: madformer.MADFormer, mesh: Mesh, limit: int, platform: str) -> ProgramReport:
    """Compiles the sampler of one batch of `sample.batch` images, with the codec's decoder."""
    images = _abstract_codec(c, mesh)
    codec_params = images.load()
    params = generation.abstract_params(model, mesh)
    batch = generation.batch_size(c, mesh, c.sample.batch)
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=partitioning.batch_sharding(mesh))
    inputs = {"parameters": params} | ({"VAE": codec_params} if codec_params else {})
    with partitioning.scope(mesh):
        network = layer_split.with_depth(model, elastic_depth.sampled_depth(c))
        sample_fn = generation.make_sample_fn(c, network, images.decode, limit)
        texts = None
        if c.text.vocabulary:
            texts = TokenizedTexts(
                jax.ShapeDtypeStruct((batch, c.text.length), jnp.int32, sharding=numbers.sharding), numbers
            )
        args = (params, codec_params, generation.make_inputs(c, numbers, numbers, text=texts))
        cost = flops.sampling(c, batch)
        return _compile_program(sample_fn, args, inputs, cost, limit, _estimator(c, mesh, cost), platform)


def _estimator(c: ConfigDict, mesh: Mesh, cost: flops.Cost) -> Estimator | None:
    """Returns a function that estimates a program's time.

    Returns None for a GPU, if `compile.time` is off, or if the clock rate of the device is unknown.
    """
    device = mesh.devices.flat[0]
    kind = device.device_kind
    if not c.compile.time or device.platform != "tpu":
        return None
    if not tpu_time.chip_spec(kind):
        logging.warning("time is not estimated: the clock rate of %s is unknown (add it to cost/tpu_time.py)", kind)
        return None
    peak = flops.peak_rate(c.model.dtype, device)
    return lambda text: tpu_time.estimate(text, kind, peak, cost.total / mesh.size)


def _abstract_codec(c: ConfigDict, mesh: Mesh) -> codec.Codec:
    """Returns the codec with abstract weights.

    A VAE has the usual widths, regardless of `codec.path`.
    """
    if c.codec.name != "vae":
        return codec.build(c)
    network = vae.typical_vae(c.codec.latent_channels, c.codec.downsampling, jnp.dtype(c.codec.dtype))
    params = vae.abstract_params(network)
    everywhere = jax.tree.map(lambda _: partitioning.replicated(mesh), params)
    return codec.from_network(
        lambda: (network, partitioning.abstract_arrays(params, everywhere)),
        codec.Scale(c.codec.scaling_factor, c.codec.shift_factor),
    )


def _abstract_batch(c: ConfigDict, mesh: Mesh) -> tuple[dict[str, jax.ShapeDtypeStruct], bool]:
    """Returns an abstract batch of the input pipeline, and whether it consists of cached latents."""
    latents = c.codec.name != "pixel" and "latents" in sources.source_class(c).kinds
    sizes, side = derive_sizes(c), c.data.image_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((side, side, c.data.channels), jnp.uint8)}
    if latents:
        shapes = dict.fromkeys(("mean", "logvar"), ((sizes.latent, sizes.latent, sizes.channels), jnp.float16))
    shapes["label"] = ((), jnp.int32)
    if c.text.vocabulary:
        shapes |= {"tokens": ((c.text.length,), jnp.int32), "lengths": ((), jnp.int32)}
    sharding = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((c.train.batch, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }
    return batch, latents


def _compile_program(
    function: Any,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    cost: flops.Cost,
    limit: int,
    estimator: Estimator | None = None,
    platform: str = "tpu",
) -> ProgramReport:
    """Compiles a function and reports on the program.

    If no time is estimated, a TPU program is first compiled at level O1, which is faster. If it comes
    close to the limit, it is compiled again as in a run.
    """
    began = time.perf_counter()
    lowered = function.lower(*args)
    quick = estimator is None and platform == "tpu"
    if quick:
        compiled, refused = _compile(lowered, _QUICK_OPTIONS)
        memory = _memory_by_kind(compiled)
        quick = refused is None and sum(memory.values()) < _QUICK_FIT_FRACTION * limit
        if not quick:
            logging.info("memory is close to the limit or above it: compiling again at the optimization level of a run")
    if not quick:
        compiled, refused = _compile(lowered, _NO_AUTOTUNE_OPTIONS if platform == "gpu" else {})
        memory = _memory_by_kind(compiled)
    seconds = time.perf_counter() - began
    input_bytes = {name: partitioning.device_bytes(tree) for name, tree in inputs.items()}
    if refused is not None:
        return ProgramReport(seconds, quick, input_bytes, {}, refused[0], limit, cost, 0.0, [])
    xla = compiled.cost_analysis() or {}
    xla = xla[0] if isinstance(xla, list) else xla
    text = compiled.as_text()
    return ProgramReport(
        seconds, quick, input_bytes, memory, sum(memory.values()), limit, cost, xla.get("flops", 0.0),
        hlo.collectives(text), estimator(text) if estimator else None, hlo.library_calls(text),
        gpu_work.measure(text) if platform == "gpu" else None,
    )  # fmt: skip


# XLA's level O1 compiles in a third of the time. It is good for memory only: the same matrix products
# take up to four times the cycles. A run compiles at O2, which keeps gathered parameters of more layers
# in memory (FFHQ-1024 on v5e:4x4: 8.1 GiB instead of 6.5). So O1 only decides well below the limit.
_QUICK_OPTIONS = {"optimization_level": 19}
_QUICK_FIT_FRACTION = 0.7
_NO_AUTOTUNE_OPTIONS = {"xla_gpu_autotune_level": 0}


def _memory_by_kind(compiled: Any) -> dict[str, int]:
    """Returns the bytes that a compiled program needs by kind; empty if it is None."""
    if compiled is None:
        return {}
    m = compiled.memory_analysis()
    return {
        "inputs": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,  # without those that reuse a donated input
        "temporaries": m.temp_size_in_bytes,
        "program": m.generated_code_size_in_bytes,
    }


def _compile(lowered: Any, options: dict[str, Any]) -> tuple[Any, tuple[int, int | None] | None]:
    """Returns the compiled program, or None and the (needed, available) bytes if it does not fit."""
    try:
        with _disable_compilation_cache():
            return lowered.compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        needed, available = (re.search(pattern, text) for pattern in _OUT_OF_MEMORY_PATTERNS)
        if needed is None:
            raise
        return None, (_parse_bytes(needed), None if available is None else _parse_bytes(available))


_OUT_OF_MEMORY_PATTERNS = (r"(?:Used |temporaries \()([\d.]+)([KMGT])", r"(?:available HBM \(| of )([\d.]+)([KMGT])")


def _parse_bytes(match: re.Match[str]) -> int:
    return round(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])


@contextlib.contextmanager
def _disable_compilation_cache() -> Iterator[None]:
    """Disables the compilation cache, so that the measured seconds are those of compilation."""
    settings: Any = jax.config  # its type does not declare its fields
    before = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


# ---- the report


def format_report(name: str, p: ProgramReport, devices: int) -> str:
    """Formats the report on one program as text."""
    rows = p.inputs | {kind: size for kind, size in p.memory.items() if kind != "inputs"}
    level = " at level O1" if p.quick_compile else ""
    lines = [f"\n{name}, {'compiled in' if p.compiled else 'refused after'} {p.seconds:.0f} s{level}"]
    lines += [f"  {kind:<24}{size / GIB:9.3f} GiB per device" for kind, size in rows.items()]
    share = f"{p.required_bytes / GIB:9.3f} GiB of {p.limit_bytes / GIB:.2f}"
    verdict = "fits" if p.fits else f"does not fit: {(p.required_bytes - p.limit_bytes) / GIB:.2f} GiB too much"
    lines.append(f"  {'total':<24}{share}: {verdict}")
    lines.append(
        f"  {'FLOPs, analytic':<24}{p.cost.total / 1e12:9.2f} TFLOP, {p.cost.total / devices / 1e12:.2f} per device"
    )
    if p.compiled:
        lines.append(
            f"  {'FLOPs, XLA':<24}{p.xla_flops / 1e12:9.2f} TFLOP per device, the body of each loop counted once"
        )
        for kernel, calls in (p.kernels or {}).items():
            lines.append(f"  {kernel:<24}{calls:9} instructions")
        for kind in hlo.COLLECTIVES:
            collectives = [x for x in p.collectives if x.kind == kind]
            if collectives:
                loops = sum(x.loop for x in collectives)
                executions = sum(x.times for x in collectives)
                moved = sum(x.moved for x in collectives) / GIB
                lines.append(
                    f"  {kind:<24}{moved:9.3f} GiB per device; {executions:.0f} calls of {len(collectives)} instructions, "
                    f"{loops} of them in loops"
                )
    lines += [tpu_time.format_estimate(p.time)] if p.time else []
    lines += [gpu_work.format_work(p.work)] if p.work else []
    return "\n".join(lines)
