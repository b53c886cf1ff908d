"""--mode=train: trains a model, going on from its newest checkpoint, and draws samples.

The loop, and below it what goes with the loop: going on or starting anew, reporting, drawing, saving.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import fields, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.cost import flops
from madformer_jax.data import pipeline, text
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import sample_scores
from madformer_jax.runtime import checkpoint, lock, memory, partitioning, progress, storage
from madformer_jax.runtime.preemption import Preemption
from madformer_jax.sampling import codec, generation
from madformer_jax.training import hooks, train_step
from madformer_jax.training.metric_writer import DivergedError, MetricWriter


def run(c: ConfigDict, workdir: str, *, grids: bool = True) -> dict[str, Any]:
    """Trains to `train.steps`, going on from the newest checkpoint in `workdir`.

    Args:
      c: the config.
      workdir: where everything is written.
      grids: whether to draw samples, at the end and every `train.sample_every` steps.

    Returns:
      The last report: the step, and the means since the report before. With "stopped" where it was asked to stop, be it in
      the last step.

    Raises:
      ConfigError: a setting, the data, the workdir or a checkpoint is wrong, somebody else trains there, or the loss is no
        longer finite.
    """
    config_lib.validate(c)
    storage.check_arrays_path(workdir, write=True)
    judge = sample_scores.open_judge(c, workdir, c.train.evaluate_n) if c.train.evaluate_every else None
    with contextlib.ExitStack() as stack:
        # data, devices, model
        with progress.log_while("opening the data"):
            info = pipeline.dataset_info(c)
        config_lib.resolve_label_numbers(c, info.names)
        mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        share, shares = partitioning.batch_share(mesh, c.train.batch, c.train.accumulate)
        s = train_step.make_setup(c)
        s = s._replace(codec=codec.require_weights(s.codec, info.codec))
        create, abstract = train_step.create_state(s.model, s.tx, c.seed, mesh)
        cost = flops.training_step(c, encode=info.kind == "images").total

        # state: that of the newest checkpoint, or a new one
        memory.check_state_fits(
            "training", mesh, parameters=abstract.params, averages=abstract.ema, optimizer=abstract.opt
        )
        codec_params = jax.device_put(s.codec.load() if info.kind == "images" else {}, partitioning.replicated(mesh))
        check_lock = stack.enter_context(lock.acquire(workdir))
        checkpoint.check_config(c, workdir)
        _log_run_summary(c, info, s, cost, mesh.size)
        data = pipeline.train_iterator(c, batch=c.train.batch // shares, process_index=share, process_count=shares)
        stack.callback(data.close)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir, c.train.keep, c.train.keep_every, state=abstract)
        )
        if checkpoint.exists(workdir):
            state = _resume(c, workdir, checkpoints, abstract, data, info)
        else:
            state = _load_initial_weights(c, create()) if c.train.init_from else create()
        step, steps, seed = int(state.step), c.train.steps, np.uint32(c.seed)

        # the step, and what goes with it
        out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), partitioning.replicated(mesh))
        program = jax.jit(train_step.make_step(s, c), donate_argnums=0, out_shardings=out_shardings)
        step_fn = progress.log_compilation(program, "the training step")
        report = stack.enter_context(contextlib.closing(MetricWriter(c, workdir, step, cost, mesh.size)))
        left = memory.device_capacity() - partitioning.device_bytes(abstract)
        draw = progress.log_compilation(
            generation.make_sample_fn(c, s.model, s.codec.decode, left), "the sampling program"
        )
        studio = hooks.TrainContext(s, draw, codec_params, mesh, report)
        asides: list[tuple[hooks.Hook, int]] = []
        if grids:
            asides.append((hooks.SampleGrid(c, studio, workdir), c.train.sample_every))
        if judge:
            asides.append((hooks.Scores(c, studio, judge), c.train.evaluate_every))
        if c.train.validate_every:
            asides.append((hooks.Validation(c, studio, share, shares), c.train.validate_every))
        profile = stack.enter_context(_make_profiler(c, workdir, step))
        stopping = stack.enter_context(Preemption())
        save = stack.enter_context(CheckpointSaver(c, workdir, checkpoints, report, info, check_lock))
        stack.enter_context(partitioning.scope(mesh))

        # loop
        while step < steps:
            profile(step)
            read = next(data)
            if save.finished is None:  # all that is read at the start is in order: from here on files are written
                partitioning.log_overview(state.params, state, epath.Path(workdir) / "parameters.txt")
                report.begin(step, c, sum(x.size for x in jax.tree.leaves(state.params)), read.get("image"))
            batch = partitioning.global_batch(read, mesh)
            state, metrics = step_fn(state, batch, codec_params, seed)
            step += 1
            save.finished = (step, state, data.get_state())
            report.add(step, metrics)
            if step % c.train.log_every == 0:
                report.write()
            if step % c.train.checkpoint_every == 0 or step == steps:
                save()
            for one, every in asides:
                if every and step % every == 0 and step < steps:
                    save.wait()  # should drawing end the process, then not for good
                    one.do(step, state, stopping.reached)
            if stopping.reached():
                save()
                break
        save.wait()
        for one, _ in asides if step == steps and not stopping.reached() else ():
            one.do(step, state, stopping.reached)
        if stopping.reached():
            logging.info("asked to stop: step %d is saved; the same command goes on from there", step)
    return report.figures | ({"stopped": True} if stopping.reached() else {})


# ---- start


def _log_run_summary(c: ConfigDict, info: pipeline.DatasetInfo, s: train_step.Setup, cost: float, devices: int) -> None:
    logging.info(
        "%d images, %d per step = %.1f epochs in %d steps; latent %d x %d x %d in %d blocks of %d tokens; attention %s",
        info.records, c.train.batch, c.train.batch * c.train.steps / info.records, c.train.steps,
        s.sizes.latent, s.sizes.latent, s.sizes.channels, s.sizes.blocks, s.sizes.tokens, s.model.attention,
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
    """The state of the newest checkpoint, with `data` set to go on behind it.

    Raises:
      ConfigError: nothing can be restored, the data set or the tokenizer has changed, or the run is further than `train.steps`.
    """
    targets = {name: getattr(abstract, name) for name in checkpoint.ARRAY_ITEMS}
    step, trees, position = checkpoints.restore(targets, data=True)
    meta = checkpoints.meta(step)
    _check_data(workdir, step, meta.get("data"), _dataset_record(info))
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
    """What a checkpoint says of the data."""
    return {"records": info.records, "fingerprint": info.fingerprint, "names": list(info.names)}


def _check_data(workdir: str, step: int, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises ConfigError where the data set is not the one that the run has seen so far: every index would mean another image."""
    if before is None:
        logging.warning(
            "step %d of %s does not say which data it has seen: the data set is not compared", step, workdir
        )
        return
    if before == now:
        return
    if before["names"] != now["names"]:
        gone, new = (sorted(set(a["names"]) - set(b["names"])) for a, b in ((before, now), (now, before)))
        changes = [f"no longer {', '.join(gone)}"] * bool(gone) + [f"now {', '.join(new)}"] * bool(new)
        what = f"its classes ({'; '.join(changes) or 'in another order'})"
    elif before["records"] != now["records"]:
        what = f"its records ({before['records']} then, {now['records']} now)"
    else:
        what = f"which records these {now['records']} are, or what they hold"
    raise ConfigError(
        f"the data set has changed since step {step} of {workdir}: {what}. Bring the old one back, or use another --workdir."
    )


def _load_initial_weights(c: ConfigDict, state: train_step.State) -> train_step.State:
    """The new state with the weights of `train.init_from`, the averages where it has them, as parameters and as averages.

    Raises:
      ConfigError: there are none, or the model is another one.
    """
    source = c.train.init_from
    target = partitioning.abstract_arrays(state.params, jax.tree.map(lambda x: x.sharding, state.params))
    try:
        checkpoint.require(source)
        if different := checkpoint.differences(c, source, ("model",)):
            raise ConfigError(f"{source} holds another model: {'; '.join(different)}.")
        with checkpoint.Checkpoints(source, read_only=True) as given:
            found = {item: shapes for item in ("ema", "params") if (shapes := given.shapes(item))}
            item = next(iter(found), "params")
            _check_shapes(found.get(item, {}), target)
            step, trees, _ = given.restore({item: target})
    except ConfigError as error:
        raise ConfigError(f"config.train.init_from: {error}") from error
    logging.info("starting from the %s of step %d of %s", item, step, source)
    return state._replace(params=trees[item], ema=jax.tree.map(jnp.copy, trees[item]))


def _check_shapes(found: dict[str, tuple[int, ...]], target: Any) -> None:
    """Raises ConfigError where arrays are not those of the target."""
    leaves, _ = jax.tree.flatten_with_path(target)
    wanted = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{name} has the shape {found.get(name, 'of nothing')} there and {wanted.get(name, 'of nothing')} here: "
                "config.model, config.codec and config.data.channels must fit the given weights."
            )


@contextlib.contextmanager
def _make_profiler(c: ConfigDict, workdir: str, step: int) -> Iterator[Callable[[int], Any]]:
    """A function of the step that is about to run, which writes the trace that `profile` asks for."""
    steps = validation.profiled_steps(c)
    if steps is None:
        yield lambda step: None
        return
    first, last = steps
    if first < step:
        logging.warning("profile: step %d is behind; no trace is written", first)
    from clu import periodic_actions  # which loads TensorFlow

    profile = periodic_actions.Profile(
        logdir=f"{workdir}/profile",
        first_profile=first,
        num_profile_steps=last - first + 1,
        profile_duration_ms=None,
        every_secs=None,
    )
    try:
        yield profile
    finally:
        profile(sys.maxsize)  # ends a trace that runs


# ---- checkpoints


class CheckpointSaver:
    """Saves the state of the last finished step: when called, and where an error ends the loop before it was saved.

    A context manager around the loop, which sets `finished` = (step, state, position of the data) behind each step.
    """

    def __init__(
        self,
        c: ConfigDict,
        workdir: str,
        checkpoints: checkpoint.Checkpoints,
        report: MetricWriter,
        info: pipeline.DatasetInfo,
        check_lock: Callable[[], None],
    ):
        self.finished: tuple[int, train_step.State, dict[str, Any]] | None = None
        self._c, self._workdir, self._checkpoints, self._report = c, workdir, checkpoints, report
        self._check_lock, self._inputs = check_lock, {"data": _dataset_record(info), **text.tokenizer_identity(c)}

    def __call__(self) -> None:
        """Reports, and starts to save; nothing is saved that is not finite."""
        self._report.write()
        self._report.settle()  # no checkpoint is without what led to it
        self._save()

    def _save(self) -> None:
        assert self.finished is not None  # the loop has run a step
        step, state, position = self.finished
        self._check_lock()
        checkpoint.write_config(self._c, self._workdir)  # now that it has shown that it works
        arrays = {name: getattr(state, name) for name in checkpoint.ARRAY_ITEMS}
        self._checkpoints.save(step, arrays, position, {"step": step, **self._inputs})

    def wait(self) -> None:
        """Until the last save is on disk."""
        self._checkpoints.wait()

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, DivergedError):
            self.wait()
            last = self._checkpoints.last
            good = f"step {last} of {self._workdir}" if last is not None else "none yet"
            raise ConfigError(f"{error}; the last good checkpoint: {good}.") from None
        # Several processes save together, and the others do not know of this one's error.
        if not isinstance(error, Exception) or self.finished is None or jax.process_count() > 1:
            return
        step = self.finished[0]
        try:
            self._report.check()
            self._save()
            self.wait()
        except Exception as problem:
            logging.error("step %d could not be saved: %s", step, storage.cause_message(problem))
        else:
            logging.info("step %d, the last before an error, is saved", step)
