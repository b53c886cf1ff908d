"""Device mesh, sharding of parameters and batches, and multi-process jobs.

Parameters and the main activations name their axes (`nn.with_logical_partitioning`,
`nn.with_logical_constraint`). `RULES` maps logical axes to mesh axes; change it to shard differently.
Training, sampling and evaluation use the same rules.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import numerics, preemption, storage

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis; the first rule whose mesh axis is still free in an array wins. "batch" comes first: an
# activation spends "fsdp" on its batch, so that only parameters are split along "embed".
# Kernels of convolutions are split along one dimension only: with both channel dimensions split, over fsdp and tensor, and
# the batch over data as well, XLA (jax 0.10.2, CPU) computes wrong input gradients; tests/modes/test_train.py would see it.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("conv_out", ("tensor", "fsdp")),
    ("conv_used", "tensor"),  # conv_out of a kernel that is gathered for its product
    ("embed", "fsdp"),
    ("conv_in", None),
    ("layers", None),
    ("blocks", None),
    ("tokens", None),
    ("time", None),
    ("norm", None),
)

# Seconds that one process waits for the others to fail as it has: the same error meets all of them at nearly the same moment.
PEER_TIMEOUT_SECONDS = 60.0
_failure_ids = itertools.count()


def make_mesh(data: int, fsdp: int, tensor: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the device mesh. One of the three sizes may be -1 and takes the remaining devices.

    TPU slices, which are joined by the network of a data center, lie along `data`, so that parameters are
    gathered within a slice.

    Raises:
      ConfigError: The product of the sizes is not the number of devices, or `data` is not a multiple of
        the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    mesh_sizes = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"config.mesh: {mesh_sizes}: sizes must be positive, and at most one may be -1.")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ConfigError(
            f"config.mesh: {mesh_sizes} does not fit {len(devices)} devices: the product must be that number."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    if sizes[0] % slices:
        raise ConfigError(
            f"config.mesh.data={sizes[0]} is not a multiple of the {slices} slices: set a multiple, "
            "because the other axes exchange too much for the network between slices."
        )
    grid = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=types)


def check_tensor(mesh: Mesh | AbstractMesh, heads: int, mlp_width: int) -> None:
    """Checks that layers split evenly; otherwise every device would compute parts of them redundantly.

    Raises:
      ConfigError: The devices along "tensor" do not divide the heads or the MLP's hidden width.
    """
    tensor = mesh.shape["tensor"]
    for name, size in {"heads": heads, "mlp_width": mlp_width}.items():
        if size % tensor:
            raise ConfigError(
                f"config.model.{name}={size} is not a multiple of the {tensor} devices along config.mesh.tensor: use "
                "a number that divides it, and config.mesh.fsdp for the rest."
            )


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
    """Sets the mesh, the axis rules and `numerics.scope` while a model is traced."""
    with numerics.scope(), jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which a batch is split, of which it must be a multiple."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_and_head_axes(mesh: Mesh | AbstractMesh, batch: int, heads: int) -> tuple[tuple[str, ...] | None, ...]:
    """Returns the mesh axes of the batch and of the heads of a kernel. None where they do not divide it."""
    logical_axes = nn.logical_to_mesh_axes(("batch", "heads")) or ((), ())
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in logical_axes]
    sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
    return tuple(names if length % size == 0 else None for names, size, length in zip(axes, sizes, (batch, heads)))


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a tree by `RULES`.

    Args:
      boxed: Abstract arrays (of `jax.eval_shape`) in Flax boxes with logical axis names. Arrays without a box
        are replicated.
      mesh: The mesh of `make_mesh`.

    Returns:
      The unboxed tree with a NamedSharding for each array. A dimension that is not divisible by its mesh
      axes is replicated, with a line in the log.
    """
    logical = nn.get_partition_spec(boxed)
    specs = nn.logical_to_mesh(logical, RULES)
    undivided: list[tuple[int, str]] = []  # bytes of each array on a device, and what does not divide

    def fit(path: Any, array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        axes, problem = list(spec), ""
        for i, axis in enumerate(axes):
            names = (axis,) if isinstance(axis, str) else axis or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if array.shape[i] % parts:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                problem = f"{name}, dimension {i} of {array.shape}; config.mesh.{' x '.join(names)} = {parts}"
                problem += f" where {math.gcd(array.shape[i], parts)} would do"
                axes[i] = None
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        if problem:
            undivided.append((device_bytes(abstract_arrays(array, sharding)), problem))
        return sharding

    fitted = jax.tree_util.tree_map_with_path(fit, nn.meta.unbox(boxed), specs)
    if undivided:
        size, largest = sum(size for size, _ in undivided), max(undivided)[1]
        logging.log(
            logging.WARNING if size >= 2**20 else logging.INFO,
            "%d arrays, %.3f GiB on each device, are not split, as the mesh does not divide them; the largest: %s",
            len(undivided), size / 2**30, largest,
        )  # fmt: skip
    return fitted


def abstract_arrays(tree: Any, sharding: Any) -> Any:
    """Returns abstract arrays with the shapes and types of a tree, and other shardings: the target of a restore."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)


def device_bytes(tree: Any) -> int:
    """Returns the bytes on one device of a tree of arrays, or abstract arrays, with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def log_overview(params: Any, state: Any, path: storage.Path) -> None:
    """Logs the parameters of each part and the memory on a device, and lists all parameters in a file.

    Raises:
      ConfigError: The file cannot be written.
    """
    if jax.process_index() == 0:
        with storage.wrap_errors(f"{path} cannot be written"):
            storage.write_text(path, parameter_overview.get_parameter_overview(params, include_stats="sharding") + "\n")
    sizes = {name: sum(x.size for x in jax.tree.leaves(subtree)) for name, subtree in params.items()}
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    logging.info("%s parameters: %s; full list: %s", f"{sum(sizes.values()):,}", parts, path)
    sizes_in_mib = device_bytes(params) / 2**20, device_bytes(state) / 2**20
    logging.info("on each device: %.1f MiB of parameters; %.1f MiB with averages and optimizer state", *sizes_in_mib)


def check_batch(mesh: Mesh, batch: int, accumulate: int) -> None:
    """Raises ConfigError if a microbatch is not a multiple of the devices along "data" and "fsdp"."""
    micro, parts = batch // accumulate, batch_devices(mesh)
    if micro % parts == 0:
        return
    most = max((n for n in range(1, accumulate) if batch % (n * parts) == 0), default=None)
    advice = f"set train.accumulate={most}" if most else f"set train.batch to a multiple of {parts}, or use mesh.tensor"
    raise ConfigError(
        f"a microbatch of {micro} images (train.batch={batch} / train.accumulate={accumulate}) is not a multiple of the "
        f"{parts} devices along data and fsdp: {advice}."
    )


def batch_share(mesh: Mesh, batch: int, accumulate: int = 1) -> tuple[int, int]:
    """Returns (index, count): this process reads share `index` of `count` equal shares of each global batch.

    Processes that differ only along "tensor" need the same images and have the same index.

    Raises:
      ConfigError: See `check_batch`; or the mesh splits the batch unevenly over processes.
    """
    check_batch(mesh, batch, accumulate)
    parts = batch_devices(mesh)
    rows: dict[int, set[int]] = {}
    device: Any
    for device, (index,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).add(index.start or 0)
    shares = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, shares)) != parts:
        raise ConfigError(f"config.mesh: {dict(mesh.shape)} splits the batch across {len(rows)} processes unevenly.")
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns global arrays, split over the mesh, made of the rows of each process."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Returns NumPy copies of whole global arrays on every process."""
    return jax.device_get(tree if jax.process_count() == 1 else _gather(mesh)(tree))


@functools.cache
def _gather(mesh: Mesh) -> Any:
    """Returns a jitted function that replicates a tree. Cached, so that it compiles once for each shape."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def sync(name: str) -> None:
    """Waits until every process has called this function."""
    multihost_utils.sync_global_devices(name)


def all_failed() -> bool:
    """Returns whether all processes have failed and called this function, so that all may continue.

    A process that failed alone must end: its collectives would no longer match those of the others.
    """
    if jax.process_count() == 1:
        return True
    from orbax.checkpoint import multihost  # slow to import, and --mode=compile needs none

    try:  # over the coordinator's network, because devices may still be busy
        multihost.get_barrier_sync_fn()(key=f"failed {next(_failure_ids)}", timeout_ms=int(1000 * PEER_TIMEOUT_SECONDS))
    except RuntimeError as error:
        logging.error("this process has failed alone, and ends: the others wait for it (%s)", first_line(error)[:80])
        return False
    return True


def distributed_init(coordinator: str, num_processes: int, process_id: int, timeout: int = 300) -> None:
    """Joins the other processes of a job. Call it before any other use of JAX.

    Args:
      coordinator: host:port of process 0; "" takes it and the two numbers from the environment of the
        cluster (TPU pod, Slurm, Open MPI).
      num_processes: Number of processes of the job; -1 with an empty coordinator.
      process_id: Number of this process, 0 to num_processes - 1; -1 with an empty coordinator.
      timeout: Seconds to wait for the others, after which this process exits with status 2.

    Raises:
      ConfigError: Flags are missing, or no cluster was found.
    """
    if coordinator and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--coordinator={coordinator} needs --num_processes and --process_id from 0 to num_processes - 1; "
            f"given {num_processes} and {process_id}."
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f"at {coordinator}" if coordinator else "as the cluster's environment says"
    count = str(num_processes) if coordinator else "all"
    logging.info("waiting for %s processes %s (at most %d s)", count, where, timeout)
    settings: dict[str, Any] = {}
    if coordinator:
        settings = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}

    def give_up() -> None:  # before JAX ends the process with a C++ stack trace
        print(
            f"error: not all of {count} processes came within {timeout} s {where}: check that the same command runs on "
            "every host, that --process_id differs on each, and that the coordinator's port is reachable.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(2)

    watchdog = threading.Timer(timeout, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(**settings, initialization_timeout=timeout + 60)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"could not join the other processes ({first_line(error)}): give --coordinator=host:port, --num_processes "
            "and --process_id where the environment names no cluster."
        ) from error
    finally:
        watchdog.cancel()
    if jax.process_count() == 1:  # without peers, SIGTERM may end the process at once
        preemption.exit_on_sigterm()
    logging.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())
