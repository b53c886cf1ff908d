"""Several training steps in one call, with the data set on the device (`train.scan`).

The host sends the numbers of the records and which images to flip. The order of the images, the
randomness and the metrics are those of single steps. `modes.train` uses it for small models on an
accelerator, where a call costs more than its arithmetic.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.config import validation
from madformer_jax.data import pipeline
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import memory, partitioning, progress
from madformer_jax.training import train_step

Table = dict[str, Array]  # name -> all records (N, ...), on every device of the mesh
Selections = dict[str, np.ndarray]  # "record" int (K, b) and "flip" bool (K, b)
# (state, table, selections, codec params, seed) -> (state, metrics (K,) of each step)
ScanFn = Callable[[train_step.State, Table, Selections, Any, Any], tuple[train_step.State, dict[str, Array]]]

MEMORY_SHARE = 0.5  # largest share of the free memory for the data


def load_table(c: ConfigDict, info: pipeline.DatasetInfo, mesh: Mesh, state: train_step.State) -> Table:
    """Reads all records of the training data and puts them on the devices.

    Args:
      c: The config.
      info: The facts of the data.
      mesh: The mesh.
      state: The abstract training state, which needs memory too.

    Raises:
      ConfigError: The data are too large, too many records cannot be read, or the job has several
        processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"config.train.scan={c.train.scan} holds the data on the devices of one process, and this job has "
            f"{jax.process_count()}: set config.train.scan=1."
        )
    itemsize = 1 if info.kind == "images" else 4  # mean and log-variance as float16
    size = info.records * int(np.prod(info.image_shape)) * itemsize
    free = MEMORY_SHARE * (memory.free_bytes(mesh) - partitioning.device_bytes(state))
    if size > free:
        raise ConfigError(
            f"config.train.scan={c.train.scan} holds the data on the device, but they take {size / memory.GIB:.2f} GiB of "
            f"{max(0, free) / memory.GIB:.2f} GiB: set config.train.scan=1, which reads them while it trains."
        )
    with progress.log_while("reading the data"):
        records = pipeline.read_all(c)
    logging.info("the data are on the device: %d records, %.1f MiB", info.records, size / 2**20)
    return jax.device_put(records, partitioning.replicated(mesh))


def make_scan(step: train_step.StepFn, mesh: Mesh) -> ScanFn:
    """Returns the pure function that runs the training step once for each selection.

    Args:
      step: The training step of `train_step.make_step`.
      mesh: The mesh, whose devices share a batch.
    """
    # XLA for CPU compiles fast gradients of convolutions only outside of loops.
    unroll = mesh.devices.flat[0].platform == "cpu"

    def run(
        state: train_step.State, table: Table, selections: Selections, codec_params: Any, seed: Any
    ) -> tuple[train_step.State, dict[str, Array]]:
        def body(state: train_step.State, selection: dict[str, Array]) -> tuple[train_step.State, dict[str, Array]]:
            batch = gather(table, selection)
            batch = jax.lax.with_sharding_constraint(batch, partitioning.batch_sharding(mesh))
            return step(state, batch, codec_params, seed)

        return jax.lax.scan(body, state, jax.tree.map(jnp.asarray, selections), unroll=unroll)

    return run


def gather(table: Table, selection: dict[str, Any]) -> dict[str, Array]:
    """Returns the batch of a selection: {"image": uint8 (b, H, W, c), "label": int32 (b,)} and others of the table."""
    batch = {name: rows[selection["record"]] for name, rows in table.items()}
    if "image" in batch:
        image = batch["image"]
        batch["image"] = jnp.where(selection["flip"][..., None, None, None], image[..., ::-1, :], image)
    return batch


def first_images(table: Table, selections: Selections) -> np.ndarray | None:
    """Returns the images of the first of the selected batches, uint8 (b, H, W, c); None for cached latents."""
    images = gather(table, {name: rows[0] for name, rows in selections.items()}).get("image")
    return None if images is None else np.asarray(images)


def next_selections(data: Iterator[pipeline.Batch], count: int) -> Selections:
    """Returns the selections of the next steps."""
    rows = [next(data) for _ in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def chunk_length(c: ConfigDict, step: int, intervals: Iterable[int]) -> int:
    """Returns how many steps to run in one call.

    It is `train.scan`, or less if the host has work to do after an earlier step.

    Args:
      c: The config.
      step: Number of steps that are done.
      intervals: Intervals of such work in steps; 0 for work that is not repeated.
    """
    profiled = validation.profiled_steps(c)
    stops = [c.train.steps, *([profiled[0]] if profiled and profiled[0] > step else [])]
    stops += [
        step - step % interval + interval
        for interval in (c.train.log_every, c.train.checkpoint_every, *intervals)
        if interval
    ]
    return min([c.train.scan, *(end - step for end in stops)])
