"""Training of several runs as lanes of one program (`train.lanes`).

The runs differ only in seeds and in the numbers of `FIELDS`. One vmapped step trains all of them.
Each lane has its own data order, randomness, workdir, checkpoints and metrics, and equals a run of
its own within rounding. `modes.train.run_lanes` opens the lanes, and `modes.sweep` groups runs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.config import fields, seeds
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import partitioning
from madformer_jax.training import hooks, scanned_steps, train_step
from madformer_jax.training.checkpoint_saver import CheckpointSaver
from madformer_jax.training.metric_writer import DivergedError, MetricWriter

# Numbers that may differ between lanes: no branch of the training step depends on them.
FIELDS = (
    "optimizer.learning_rate", "optimizer.b1", "optimizer.b2", "optimizer.weight_decay", "train.ema_decay",
    "train.label_dropout", "loss.image", "loss.hidden", "loss.clean", "loss.text",
)  # fmt: skip
MEASURED_CALLS = 5  # of each program that `faster_together` measures
_FREE_SECTIONS = ("seeds", "sample", "gallery", "demo")  # besides `seed`: each lane has its own values


class Lane(NamedTuple):
    """A run and everything that its lane writes to."""

    config: ConfigDict
    workdir: str
    state: train_step.State
    data: Iterator[pipeline.Batch]
    metric_writer: MetricWriter
    saver: CheckpointSaver
    hooks: list[tuple[hooks.Hook, int]]


def group_key(c: ConfigDict) -> tuple[Any, ...]:
    """Returns the settings that all lanes of a program share.

    A loss term of weight 0 is not computed. The settings therefore include whether each weight is 0.
    """
    values = {name: x for name, x in fields.flat(c).items() if name.partition(".")[0] not in (*_FREE_SECTIONS, "seed")}
    return tuple((name, bool(x) if name in FIELDS else x) for name, x in values.items())


def differing_numbers(configs: Sequence[ConfigDict]) -> dict[str, np.ndarray]:
    """Returns the numbers of `FIELDS` that differ between configs, float32 (lanes,)."""
    flat = [fields.flat(c) for c in configs]
    columns = {name: [values[name] for values in flat] for name in FIELDS}
    return {name: np.array(column, np.float32) for name, column in columns.items() if len(set(column)) > 1}


def make_lane_step(setup: train_step.Setup, c: ConfigDict, numbers: dict[str, np.ndarray]) -> train_step.StepFn:
    """Returns the pure training step of all lanes.

    Args:
      setup: The setup of the config.
      c: The config of any lane.
      numbers: See `differing_numbers`.

    Returns:
      (states, batch, codec params, seeds) -> (states, metrics). States, batch, seeds (lanes,) and
      metrics have a leading axis of lanes.
    """

    def step(
        values: dict[str, Array], state: train_step.State, batch: dict[str, Array], codec_params: Any, seed: Any
    ) -> tuple[train_step.State, dict[str, Array]]:
        lane = _with_numbers(c, values)
        lane_setup = setup._replace(tx=train_step.optimizer(lane))
        return train_step.make_step(lane_setup, lane)(state, batch, codec_params, seed)

    batched = jax.vmap(step, in_axes=(0, 0, 0, None, 0))
    return lambda *args: batched({name: jnp.asarray(column) for name, column in numbers.items()}, *args)


def _with_numbers(c: ConfigDict, values: dict[str, Array]) -> ConfigDict:
    """Returns a config with traced numbers, for the functions that build a step."""
    sections = c.to_dict()
    for name, value in values.items():
        section, _, field = name.partition(".")
        sections[section][field] = value
    return ConfigDict(sections, type_safe=False)


def stack_states(states: Sequence[train_step.State]) -> train_step.State:
    """Returns states with a leading axis of lanes."""
    return jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))(*states)


@jax.jit
def lane_state(states: train_step.State, index: int | Array) -> train_step.State:
    """Returns the state of a lane."""
    return jax.tree.map(lambda x: x[index], states)


def make_program(
    setup: train_step.Setup, configs: Sequence[ConfigDict], mesh: Mesh, table: scanned_steps.Table | None
) -> Callable[..., tuple[train_step.State, dict[str, Array]]]:
    """Returns the jitted program: one step of all lanes, or `train.scan` of them with a table of the data."""
    step = make_lane_step(setup, configs[0], differing_numbers(configs))
    if table is None:
        return jax.jit(step, donate_argnums=0)
    program = jax.jit(scanned_steps.make_scan(step, mesh), donate_argnums=0)
    return lambda states, selections, *arguments: program(states, table, selections, *arguments)


def loop(
    lanes: Sequence[Lane],
    program: Callable[..., tuple[train_step.State, dict[str, Array]]],
    table: scanned_steps.Table | None,
    codec_params: Any,
    stop: Callable[[], bool],
) -> dict[int, ConfigError]:
    """Steps all lanes to `train.steps` or until they are asked to stop, and saves.

    Args:
      lanes: The lanes, all at the same step.
      program: See `make_program`.
      table: The data on the device; None to send batches.
      codec_params: Parameters of the codec.
      stop: Returns whether to save and exit.

    Returns:
      The error of each lane that has diverged. The other lanes continue.
    """
    c, failed = lanes[0].config, dict[int, ConfigError]()
    step, steps = int(lanes[0].state.step), c.train.steps
    if step == steps:
        return {}
    states = stack_states([lane.state for lane in lanes])
    seed = np.array([seeds.of(lane.config, "data") for lane in lanes], np.uint32)
    intervals = [interval for lane in lanes for _, interval in lane.hooks]
    in_flight: list[tuple[int, dict[str, Array]]] = []

    def running() -> list[int]:
        return [i for i in range(len(lanes)) if i not in failed]

    def flush(leave: int = 0) -> None:
        """Gives finished metrics to the writers; the metrics of `leave` calls may stay on the device."""
        while len(in_flight) > leave:
            number, metrics = in_flight.pop(0)
            fetched = jax.device_get(metrics)
            for i in running():
                lanes[i].metric_writer.add(number, {name: x[..., i] for name, x in fetched.items()})

    def write(save: bool) -> None:
        for i in running():
            lane = lanes[i]
            try:
                if save:
                    lane.saver.last_finished = (step, lane_state(states, i), lane.data.get_state())  # type: ignore[attr-defined]
                    lane.saver()
                else:
                    lane.metric_writer.write()
            except DivergedError as error:
                failed[i] = lane.saver.diverged(error)
                logging.error("%s: %s", lane.workdir, failed[i])
            finally:
                lane.saver.last_finished = None  # after an error later, the newest checkpoint is enough

    def run_hooks(at_end: bool) -> None:
        for i in running():
            for hook, interval in lanes[i].hooks:
                if at_end or (interval and step % interval == 0 and step < steps):
                    lanes[i].saver.wait()
                    hook.run(step, lane_state(states, i), stop)

    for i in running():
        _log_start(lanes[i], step, lane_state(states, i))
    stopping = False
    while step < steps and running() and not stopping:
        count = 1 if table is None else scanned_steps.chunk_length(c, step, intervals)
        batch = _next_batch(lanes, count, scanned=table is not None)
        states, metrics = program(states, batch, codec_params, seed)
        step += count
        in_flight.append((step, metrics))
        stopping = stop()
        saves = step % c.train.checkpoint_every == 0 or step == steps or stopping
        logs_now = step % c.train.log_every == 0
        hooked = any(interval and step % interval == 0 for interval in intervals)
        flush(leave=0 if saves or logs_now or hooked else 1)
        if logs_now:
            write(save=False)
        if saves:
            write(save=True)
        run_hooks(at_end=False)
    for i in running():
        lanes[i].saver.wait()
    if step == steps and not stopping:
        run_hooks(at_end=True)
    return failed


def _next_batch(lanes: Sequence[Lane], count: int, scanned: bool) -> dict[str, np.ndarray]:
    """Returns the next batch (lanes, b, ...), or the selections (K, lanes, b) of the next calls."""
    rows = [scanned_steps.next_selections(lane.data, count) if scanned else next(lane.data) for lane in lanes]
    return {name: np.stack([row[name] for row in rows], axis=1 if scanned else 0) for name in rows[0]}


def _log_start(lane: Lane, step: int, state: train_step.State) -> None:
    partitioning.log_overview(state.params, state, epath.Path(lane.workdir) / "parameters.txt")
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    lane.metric_writer.log_start(step, parameters, None)


def faster_together(
    lanes: Sequence[Lane], setup: train_step.Setup, mesh: Mesh, table: scanned_steps.Table | None, codec_params: Any
) -> bool:
    """Measures whether all lanes together train more steps per second than one lane alone."""
    rates = []
    for group in (lanes[:1], lanes):
        program = make_program(setup, [lane.config for lane in group], mesh, table)
        positions = [lane.data.get_state() for lane in group]  # type: ignore[attr-defined]
        batch = _next_batch(group, group[0].config.train.scan, scanned=table is not None)
        for lane, position in zip(group, positions):
            lane.data.set_state(position)  # type: ignore[attr-defined]
        states, seed = stack_states([lane.state for lane in group]), np.zeros(len(group), np.uint32)
        for call in range(1 + MEASURED_CALLS):
            states, _ = program(states, batch, codec_params, seed)
            if call == 0:  # this call compiles
                jax.block_until_ready(states)
                began = time.monotonic()
        jax.block_until_ready(states)
        rates.append(len(group) * MEASURED_CALLS * group[0].config.train.scan / (time.monotonic() - began))
    logging.info("steps/s: %.3g for one run alone, %.3g in total for %d runs in one program", *rates, len(lanes))
    return rates[1] > rates[0]
