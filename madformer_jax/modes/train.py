"""--mode=train: the loop."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from ml_collections import ConfigDict

from madformer_jax import config as config_lib
from madformer_jax import drawing, flops, training
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, partitioning


def _mean(fetched: list[dict[str, Any]]) -> dict[str, float]:
    """Means over steps; a quarter of the timesteps that no block fell into counts for nothing."""
    values = {name: np.array([m[name] for m in fetched], np.float64) for name in fetched[0]}
    quarters = [name for name in values if name.startswith("loss_q")]
    for name in quarters:
        values[name] = values[name][~np.isnan(values[name])]
    return {name: float(v.mean()) for name, v in values.items() if len(v)}


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def run(c: ConfigDict, workdir: str) -> None:
    """Trains to `train.steps`, going on from the newest checkpoint in `workdir`, and draws a last grid of samples.

    Raises:
      ConfigError: a setting, the data, the workdir or a checkpoint is wrong; or the loss is no longer finite.
    """
    config_lib.validate(c)
    info = pipeline.describe(c)
    config_lib.number_labels(c, info.names)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    if (c.train.batch // c.train.accumulate) % partitioning.batch_devices(mesh):
        raise ConfigError(
            f"a microbatch of {c.train.batch // c.train.accumulate} images (train.batch / train.accumulate) is not a "
            f"multiple of the {partitioning.batch_devices(mesh)} devices along data and fsdp."
        )
    share, shares = partitioning.batch_share(mesh, c.train.batch)
    s = training.setup(c)
    checkpoint.check_config(c, workdir)
    checkpoint.write_config(c, workdir)
    create, abstract = training.create_state(s.model, s.tx, c.seed, mesh)
    data = pipeline.train_iterator(c, batch=c.train.batch // shares, process_index=share, process_count=shares)
    checkpoints = checkpoint.Checkpoints(workdir, c.train.keep, c.train.keep_every, state=abstract)
    logging.info(
        "%d images, %d per step = %.1f epochs in %d steps; latent %d x %d x %d in %d blocks of %d tokens; attention %s",
        info.records, c.train.batch, c.train.batch * c.train.steps / info.records, c.train.steps,
        s.sizes.latent, s.sizes.latent, s.sizes.channels, s.sizes.blocks, s.sizes.tokens, s.model.attention,
    )  # fmt: skip

    if checkpoint.exists(workdir):
        targets = {name: getattr(abstract, name) for name in checkpoint.ARRAYS}
        first, trees, at = checkpoints.restore(targets, data=True)
        checkpoints.drop_after(first)
        state = training.State(step=jax.device_put(np.int32(first), abstract.step.sharding), **trees)
        data.set_state(at)
        logging.info("going on from step %d of %s", first, workdir)
    else:
        state = create()
        partitioning.log_overview(state.params, state)

    out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), partitioning.replicated(mesh))
    step_fn = jax.jit(training.make_step(s, c), donate_argnums=0, out_shardings=out_shardings)
    codec_params = jax.device_put(s.codec.load() if info.kind == "images" else {}, partitioning.replicated(mesh))
    drawer = drawing.make_draw(c, s.model, s.codec.decode)
    # clu's logging writer is left out: the log line below says the same
    writer = metric_writers.MultiWriter([metric_writers.SummaryWriter(workdir)] if jax.process_index() == 0 else [])
    steps, step = c.train.steps, int(state.step)
    cost = flops.training_step(c, encode=info.image_shape[0] == c.data.image_size)  # cached latents are smaller
    peak = mesh.size * flops.peak(c.model.dtype)
    logging.info("a step costs %.3g TFLOP; %d devices reach %.3g TFLOP/s", cost.total / 1e12, mesh.size, peak / 1e12)
    trace = _trace(c.profile)

    def save() -> None:
        arrays = {name: getattr(state, name) for name in checkpoint.ARRAYS}
        checkpoints.save(step, arrays, data.get_state(), {"step": step})

    pending: list[dict[str, Any]] = []
    since, since_step, warm = time.time(), step, False

    def report() -> None:
        nonlocal pending, since, since_step
        if not pending:
            return
        fetched = jax.device_get(pending)
        for number, metrics in enumerate(fetched, step - len(fetched) + 1):
            # Every step up to a checkpoint is looked at: finite gradients keep a finite state finite.
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                checkpoints.wait()
                good = f"step {checkpoints.last} of {workdir}" if checkpoints.last is not None else "none yet"
                raise ConfigError(
                    f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {number}: training has diverged. "
                    f"Lower optimizer.learning_rate or set optimizer.clip; the last good checkpoint: {good}."
                )
        mean = _mean(fetched)
        rate = (step - since_step) / (time.time() - since)  # 0 where only the step that compiled was run
        speed = {"steps_per_second": rate, "images_per_second": c.train.batch * rate}
        speed |= {"tflops": cost.total * rate / 1e12, "mfu": cost.total * rate / peak}
        writer.write_scalars(step, mean | speed)
        writer.flush()
        logging.info(
            "step %d/%d (%d %%)  loss %.4f%s  |g| %.2f  lr %.1e  %.2f steps/s  %.0f img/s  "
            "%.3g TFLOP/s  MFU %.0f %%  ETA %s",
            step, steps, 100 * step // steps, mean["loss"],
            "".join(f"  {n[5:]} {v:.4f}" for n, v in mean.items() if n.startswith("loss_")),
            mean["grad_norm"], mean["learning_rate"], rate, c.train.batch * rate,
            speed["tflops"], 100 * speed["mfu"],
            _duration((steps - step) / rate) if rate else "unknown",
        )  # fmt: skip
        pending, since, since_step = [], time.time(), step

    def draw() -> None:
        nonlocal since
        began = time.time()
        weights = state.ema if c.sample.weights == "ema" else state.params
        decoder = jax.device_put(s.codec.load(), partitioning.replicated(mesh))
        images = drawing.grid(c, drawer, weights, decoder, mesh, workdir, step)
        writer.write_images(step, {f"samples_{c.sample.weights}": images})
        since += time.time() - began

    with partitioning.scope(mesh), checkpoints, checkpoint.Preemption() as preemption:
        while step < steps:
            trace(step, workdir)
            batch = partitioning.global_batch(next(data), mesh)
            state, metrics = step_fn(state, batch, codec_params)
            pending.append(metrics)
            step += 1
            if len(pending) > 1:  # at most two steps in flight: a notice to stop is heard, and no queue grows
                jax.block_until_ready(pending[-2])
            if not warm:  # the first step compiled; it is left out of the rates
                jax.block_until_ready(metrics)
                logging.info("compiled the training step and ran it in %.1f s", time.time() - since)
                since, since_step, warm = time.time(), step, True
            if step % c.train.log_every == 0 or step == steps:
                report()
            if c.train.sample_every and step % c.train.sample_every == 0 and step < steps:
                draw()
            stopping = preemption.reached(step)
            if step % c.train.checkpoint_every == 0 or step == steps or stopping:
                report()
                save()
            if stopping and step < steps:
                checkpoints.wait()
                logging.info("asked to stop: step %d is saved; the same command goes on from there", step)
                break
        trace(-1, workdir)
        checkpoints.wait()
        if step == steps:
            draw()
    writer.close()
    data.close()


def _trace(profile: str) -> Callable[[int, str], None]:
    """A function that starts and stops the profiler at the steps of "first:last"."""
    if not profile:
        return lambda step, workdir: None
    try:
        first, last = (int(part) for part in profile.split(":"))
    except ValueError:
        raise ConfigError(f"config.profile={profile!r} must be two steps, as in '100:103'.") from None
    running = False

    def trace(step: int, workdir: str) -> None:
        nonlocal running
        if step == first and not running:
            jax.profiler.start_trace(f"{workdir}/profile")
            running = True
        elif running and (step > last or step < 0):
            jax.profiler.stop_trace()
            running = False
            logging.info("wrote a profiler trace of steps %d to %d to %s/profile", first, last, workdir)

    return trace
