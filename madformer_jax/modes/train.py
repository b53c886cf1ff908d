"""--mode=train: trains a model from its newest checkpoint or from new weights.

`run` prepares the data, the devices and the model (`_prepare`), restores or creates the state
(`_restore_or_initialize`) and steps to `train.steps` (`_loop`). Work between steps, such as sample
grids and scores, is a `hooks.Hook`: add yours in `_make_hooks`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.config import elastic_depth, fields, seeds, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.cost import flops
from madformer_jax.data import pipeline, text
from madformer_jax.diffusion.autoguidance import GuidedPair
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.judge import Judge, open_judge
from madformer_jax.models import layer_split
from madformer_jax.runtime import checkpoint, lock, memory, partitioning, progress, storage
from madformer_jax.runtime.preemption import Preemption
from madformer_jax.sampling import codec, generation
from madformer_jax.sampling.opening import open_guide
from madformer_jax.training import elastic_step, hooks, initial_weights, lanes, scanned_steps, trackers, train_step
from madformer_jax.training.checkpoint_saver import CheckpointSaver
from madformer_jax.training.metric_writer import MetricWriter


def run(c: ConfigDict, workdir: str, *, grids: bool = True) -> dict[str, Any]:
    """Trains to `train.steps`, from the newest checkpoint in `workdir` if it has one.

    With `grids`, draws samples at the end and every `train.sample_every` steps.

    Returns:
      The last report: the step, and the means since the report before it. "stopped" is True if the
      run was asked to stop, also if that was during its last step.

    Raises:
      ConfigError: A setting, the data, the workdir or a checkpoint is wrong. Another process trains
        in the workdir. The loss is no longer finite.
    """
    with contextlib.ExitStack() as stack:
        prepared = _prepare(c, workdir, stack)
        state = _restore_or_initialize(c, workdir, prepared)
        calls = _open_loop_calls(c, workdir, prepared, int(state.step), grids, stack)
        _loop(c, workdir, prepared, calls, state)
    return calls.metric_writer.figures | ({"stopped": True} if calls.preemption.reached() else {})


def run_lanes(configs: Sequence[ConfigDict], workdirs: Sequence[str]) -> list[dict[str, Any] | ConfigError] | None:
    """Trains several runs in one program (`training.lanes`), each as `run` does without sample grids.

    Args:
      configs: Configs with the same `lanes.group_key`.
      workdirs: The workdir of each, all at the same step.

    Returns:
      For each run the report of `run`, or the error of a run that has diverged. None if
      `train.lanes` is 0 and one run after the other is faster; then nothing is trained.

    Raises:
      ConfigError: See `run`.
    """
    with contextlib.ExitStack() as stack:
        table: scanned_steps.Table | None = None
        opened: list[tuple[PreparedRun, train_step.State]] = []
        for c, workdir in zip(configs, workdirs, strict=True):
            prepared = _prepare(c, workdir, stack, table)
            table = prepared.table
            opened.append((prepared, _restore_or_initialize(c, workdir, prepared)))
        group: list[lanes.Lane] = []
        for c, workdir, (prepared, state) in zip(configs, workdirs, opened, strict=True):
            calls = _open_loop_calls(c, workdir, prepared, int(state.step), False, stack)
            group.append(lanes.Lane(c, workdir, state, prepared.data, calls.metric_writer, calls.saver, calls.hooks))
        setup, mesh, codec_params = prepared.setup, prepared.mesh, prepared.codec_params
        if configs[0].train.lanes == 0 and not lanes.faster_together(group, setup, mesh, table, codec_params):
            return None
        program = progress.log_compilation(
            lanes.make_program(setup, configs, mesh, table), f"the training step of {len(configs)} runs"
        )
        # Each run installs a handler of signals. The last one gets them, so its `preemption` stops all runs.
        failed = lanes.loop(group, program, table, codec_params, calls.preemption.reached)
    stopped = {"stopped": True} if calls.preemption.reached() else {}
    return [failed.get(i, lane.metric_writer.figures | stopped) for i, lane in enumerate(group)]


class PreparedRun(NamedTuple):
    """Everything that a run opens before it has a state: data, devices, model and checkpoints."""

    judge: Judge | None  # None without scores in training
    info: pipeline.DatasetInfo
    mesh: Mesh
    # index of this process among those that read different rows of a batch, and their number
    process_index: int
    process_count: int
    setup: train_step.Setup
    create_state: Callable[[], train_step.State]
    abstract_state: train_step.State
    step_flops: float
    codec_params: Any  # empty if cached latents need none
    check_lock: Callable[[], None]
    data: Any  # the iterator of training batches, or of their records if there is a table
    table: scanned_steps.Table | None  # the data on the device, with `train.scan`
    checkpoints: checkpoint.Checkpoints


class LoopCalls(NamedTuple):
    """Everything that the loop calls: the step, hooks, writers and the profiler."""

    step_fn: Callable[..., tuple[train_step.State, dict[str, Any]]]
    metric_writer: MetricWriter
    hooks: list[tuple[hooks.Hook, int]]  # each with its interval in steps; 0: only at the end
    profile: Callable[[int], Any]
    preemption: Preemption
    saver: CheckpointSaver


def _prepare(
    c: ConfigDict, workdir: str, stack: contextlib.ExitStack, table: scanned_steps.Table | None = None
) -> PreparedRun:
    """Checks the config and opens data, devices, model, workdir and checkpoints, which `stack` closes.

    `table` holds the data on the device, if another run has loaded them.
    """
    config_lib.validate(c)
    trackers.check_installed(c)
    storage.check_arrays_path(workdir, write=True)
    judge = open_judge(c, workdir, c.train.evaluate_n) if c.train.evaluate_every else None
    with progress.log_while("opening the data"):
        info = pipeline.dataset_info(c)
    config_lib.resolve_label_numbers(c, info.names)
    codec.resolve_scale(c, info.scale)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    index, count = partitioning.batch_share(mesh, c.train.batch, c.train.accumulate)
    setup = train_step.make_setup(c)
    setup = setup._replace(codec=codec.require_weights(setup.codec, info.codec))
    create, abstract = train_step.create_state(
        setup.model, setup.tx, seeds.of(c, "init"), mesh, c.train.ema_snapshots > 0
    )
    step_flops = flops.training_step(c, encode=info.kind == "images").total
    averages = abstract.ema, abstract.power_ema
    memory.check_state_fits("training", mesh, parameters=abstract.params, averages=averages, optimizer=abstract.opt)
    codec_params = jax.device_put(setup.codec.load() if info.kind == "images" else {}, partitioning.replicated(mesh))
    check_lock = stack.enter_context(lock.acquire(workdir))
    checkpoint.check_config(c, workdir)
    _log_run_summary(c, info, setup, step_flops, mesh.size)
    if c.train.scan > 1 and table is None:
        table = scanned_steps.load_table(c, info, mesh, abstract)
    if table is None:
        data = pipeline.train_iterator(c, batch=c.train.batch // count, process_index=index, process_count=count)
    else:
        data = pipeline.selection_iterator(c, batch=c.train.batch)
    stack.callback(data.close)
    keep_every = [every for every in (c.train.keep_every, c.train.ema_snapshots) if every]
    checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, c.train.keep, keep_every, state=abstract))
    return PreparedRun(
        judge, info, mesh, index, count, setup, create, abstract, step_flops, codec_params, check_lock, data, table,
        checkpoints,
    )  # fmt: skip


def _restore_or_initialize(c: ConfigDict, workdir: str, r: PreparedRun) -> train_step.State:
    """Returns the state of the newest checkpoint, or a new one.

    A new state has the weights of `train.init_from`, as far as they fit, if that is set.
    """
    if checkpoint.exists(workdir):
        return _resume(c, workdir, r.checkpoints, r.abstract_state, r.data, r.info)
    return initial_weights.load(c, r.create_state()) if c.train.init_from else r.create_state()


def _open_loop_calls(
    c: ConfigDict, workdir: str, r: PreparedRun, step: int, grids: bool, stack: contextlib.ExitStack
) -> LoopCalls:
    """Makes the training program and opens what runs beside it, from `step` on."""
    out_shardings = (jax.tree.map(lambda x: x.sharding, r.abstract_state), partitioning.replicated(r.mesh))

    def jit(step_fn: train_step.StepFn, name: str) -> train_step.StepFn:
        return progress.log_compilation(_jit_step(step_fn, r, out_shardings), name)

    step_fn = elastic_step.make_program(r.setup, c, jit, step)
    metric_writer = stack.enter_context(contextlib.closing(MetricWriter(c, workdir, step, r.step_flops, r.mesh.size)))
    hook_list = _make_hooks(c, workdir, r, metric_writer, grids)
    profile = stack.enter_context(_make_profiler(c, workdir, step))
    preemption = stack.enter_context(Preemption())
    data_identity = {"data": _dataset_record(r.info), **text.tokenizer_identity(c)}
    saver = stack.enter_context(CheckpointSaver(c, workdir, r.checkpoints, metric_writer, data_identity, r.check_lock))
    stack.enter_context(partitioning.scope(r.mesh))
    return LoopCalls(step_fn, metric_writer, hook_list, profile, preemption, saver)


def _jit_step(
    step: train_step.StepFn, r: PreparedRun, out_shardings: Any
) -> Callable[..., tuple[train_step.State, Any]]:
    """Returns the jitted training step, or the jitted scan over steps on the table of the data."""
    table = r.table
    if table is None:
        return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    program = jax.jit(scanned_steps.make_scan(step, r.mesh), donate_argnums=0, out_shardings=out_shardings)
    return lambda state, selections, *rest: program(state, table, selections, *rest)


def _make_hooks(
    c: ConfigDict, workdir: str, r: PreparedRun, metric_writer: MetricWriter, grids: bool
) -> list[tuple[hooks.Hook, int]]:
    """Makes the hooks that the config asks for, each with its interval in steps."""
    free = memory.device_capacity() - partitioning.device_bytes(r.abstract_state)
    guide = open_guide(c) if c.sample.guidance != 1.0 else None
    model = layer_split.with_depth(r.setup.model, elastic_depth.sampled_depth(c))
    network = model if guide is None else GuidedPair(model, guide.network)
    sample_fn = progress.log_compilation(
        generation.make_sample_fn(c, network, r.setup.codec.decode, free), "the sampling program"
    )
    guide_params = None if guide is None else guide.params
    context = hooks.TrainContext(r.setup, sample_fn, r.codec_params, r.mesh, metric_writer, guide_params)
    result: list[tuple[hooks.Hook, int]] = []
    if grids:
        result.append((hooks.SampleGrid(c, context, workdir), c.train.sample_every))
    if r.judge:
        result.append((hooks.Scores(c, context, r.judge), c.train.evaluate_every))
    if c.train.validate_every:
        result.append((hooks.Validation(c, context, r.process_index, r.process_count), c.train.validate_every))
    return result


def _loop(c: ConfigDict, workdir: str, r: PreparedRun, calls: LoopCalls, state: train_step.State) -> None:
    """Steps to `train.steps` or until the run is asked to stop, and saves."""
    metric_writer, preemption, saver = calls.metric_writer, calls.preemption, calls.saver
    step, steps, seed = int(state.step), c.train.steps, np.uint32(seeds.of(c, "data"))
    intervals = [every for _, every in calls.hooks]
    while step < steps:
        count = 1 if r.table is None else scanned_steps.chunk_length(c, step, intervals)
        calls.profile(step)  # a trace has the whole call of several steps
        rows = next(r.data) if r.table is None else scanned_steps.next_selections(r.data, count)
        if saver.last_finished is None:  # The inputs could be read: from here on, the run writes files.
            partitioning.log_overview(state.params, state, epath.Path(workdir) / "parameters.txt")
            parameters = sum(x.size for x in jax.tree.leaves(state.params))
            images = rows.get("image") if r.table is None else scanned_steps.first_images(r.table, rows)
            metric_writer.log_start(step, parameters, images)
        batch = partitioning.global_batch(rows, r.mesh) if r.table is None else rows
        state, metrics = calls.step_fn(state, batch, r.codec_params, seed)
        step += count
        saver.last_finished = (step, state, r.data.get_state())
        metric_writer.add(step, metrics)
        if step % c.train.log_every == 0:
            metric_writer.write()
        if step % c.train.checkpoint_every == 0 or step == steps:
            saver()
        for hook, every in calls.hooks:
            if every and step % every == 0 and step < steps:
                saver.wait()  # If the hook ends the process, its step must not be lost.
                hook.run(step, state, preemption.reached)
        if preemption.reached():
            saver()
            break
    saver.wait()
    for hook, _ in calls.hooks if step == steps and not preemption.reached() else ():
        hook.run(step, state, preemption.reached)
    if preemption.reached():
        logging.info("asked to stop: step %d is saved; the same command continues from there", step)


# ---- start


def _log_run_summary(c: ConfigDict, info: pipeline.DatasetInfo, s: train_step.Setup, cost: float, devices: int) -> None:
    logging.info(
        "%d images, %d per step = %.1f epochs in %d steps; latent %d x %d x %d in %d blocks of %d tokens; attention %s",
        info.records, c.train.batch, c.train.batch * c.train.steps / info.records, c.train.steps,
        s.sizes.latent, s.sizes.latent, s.sizes.channels, s.sizes.blocks, s.sizes.tokens, s.model.config.attention.name,
    )  # fmt: skip
    peak = devices * flops.peak_rate(c.model.dtype)
    logging.info("a step costs %.3g TFLOP; peak %.3g TFLOP/s (devices: %d)", cost / 1e12, peak / 1e12, devices)


def _resume(
    c: ConfigDict,
    workdir: str,
    checkpoints: checkpoint.Checkpoints,
    abstract: train_step.State,
    data: Any,
    info: pipeline.DatasetInfo,
) -> train_step.State:
    """Returns the state of the newest checkpoint, and sets `data` to the batch after it."""
    step, trees, position = checkpoints.restore(checkpoint.array_items(abstract), data=True)
    meta = checkpoints.meta(step)
    _check_data(workdir, step, meta["data"], _dataset_record(info))
    text.check_tokenizer_identity(c, meta, step, workdir)
    if step > c.train.steps:
        raise ConfigError(f"config.train.steps={c.train.steps}, but {workdir} has been trained for {step} steps.")
    checkpoints.drop_after(step)
    before, now = fields.flat(checkpoint.read_config(workdir) or {}), fields.flat(c)
    for name in ("train.steps", "train.accumulate", *checkpoint.LEARNING_RATE_FIELDS, *checkpoint.ON_OFF_FIELDS):
        if before.get(name, now[name]) != now[name]:
            logging.info("config.%s was %s and is %s from here on", name, before[name], now[name])
    data.set_state(position)
    logging.info("going on from step %d of %s", step, workdir)
    return train_step.State(step=jax.device_put(np.int32(step), abstract.step.sharding), **trees)


def _dataset_record(info: pipeline.DatasetInfo) -> dict[str, Any]:
    """Returns the identity of the data set that is saved with a checkpoint."""
    return {"records": info.records, "fingerprint": info.fingerprint, "names": list(info.names)}


def _check_data(workdir: str, step: int, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that the data set is the one that the run has seen so far, by their `_dataset_record`.

    In another one, every index of the iterator would mean another image.
    """
    if before == now:
        return
    if before["names"] != now["names"]:
        gone, new = (sorted(set(a["names"]) - set(b["names"])) for a, b in ((before, now), (now, before)))
        changes = [f"no longer {', '.join(gone)}"] * bool(gone) + [f"now {', '.join(new)}"] * bool(new)
        difference = f"its classes ({'; '.join(changes) or 'in another order'})"
    elif before["records"] != now["records"]:
        difference = f"its records ({before['records']} then, {now['records']} now)"
    else:
        difference = f"the content or the order of its {now['records']} records"
    raise ConfigError(
        f"the data set has changed since step {step} of {workdir}: {difference}. Bring the old one back, or use another --workdir."
    )


@contextlib.contextmanager
def _make_profiler(c: ConfigDict, workdir: str, step: int) -> Iterator[Callable[[int], Any]]:
    """Yields a function to call with each step before it runs.

    The function records a trace of the steps that `config.profile` names.
    """
    steps = validation.profiled_steps(c)
    if steps is None:
        yield lambda step: None
        return
    first, last = steps
    if first < step:
        logging.warning("profile: step %d is already trained; no trace is written", first)
    recording = False

    def profile(step: int) -> None:
        nonlocal recording
        if recording and step > last:
            jax.profiler.stop_trace()
            recording = False
        elif step == first:
            jax.profiler.start_trace(f"{workdir}/profile")
            recording = True

    try:
        yield profile
    finally:
        profile(sys.maxsize)  # ends a trace that is still being recorded
