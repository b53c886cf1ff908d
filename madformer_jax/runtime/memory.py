"""Checks that parameters and optimizer state fit into memory, before they are allocated.

Training, sampling and evaluation call `check_state_fits`.
"""

import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import cores, partitioning

GIB = 2**30


def check_state_fits(purpose: str, mesh: Mesh, **trees: Any) -> None:
    """Checks that trees of arrays fit into the devices of this process.

    Args:
      purpose: First word of the message: "training", "sampling".
      mesh: The device mesh.
      **trees: Abstract arrays with shardings, by their name in the message, as in `parameters=`.

    Raises:
      ConfigError: They do not fit. The message says what is needed and what is free.
    """
    devices = mesh.local_devices
    needed = {name: partitioning.device_bytes(tree) for name, tree in trees.items()}
    free, location = _own_free_bytes(devices[0]), f"a {devices[0].device_kind}"
    if free is None:  # CPU devices share the memory of the host
        free, location = host_free_bytes(), "this machine"
        needed = {name: size * len(devices) for name, size in needed.items()}
    check_bytes(purpose, needed, free, location)


def free_bytes(mesh: Mesh) -> int:
    """Returns the free bytes of a device of this process. The devices of a CPU share those of the host."""
    free = _own_free_bytes(mesh.local_devices[0])
    return host_free_bytes() // len(mesh.local_devices) if free is None else free


def _own_free_bytes(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0)) if "bytes_limit" in stats else None


def device_capacity() -> int:
    """Returns the bytes of a device of this process; 0 on a CPU, whose devices share one memory."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def check_bytes(purpose: str, needed: dict[str, int], free: int, location: str) -> None:
    """Checks that the needed bytes are free; see `check_state_fits`.

    Raises:
      ConfigError: More is needed than is free.
    """
    total = sum(needed.values())
    if total > free:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
        raise ConfigError(
            f"{purpose} needs {total / GIB:.2f} GiB ({parts}) before it computes anything, but {location} has "
            f"{free / GIB:.2f} GiB free: make config.model smaller, spread it over more devices (config.mesh.fsdp and "
            "config.mesh.tensor must divide its widths: the log says what they do not), or end what else uses the memory."
        )


def host_free_bytes(root: str = "/") -> int:
    """Returns the bytes that this process can allocate without swapping, within its control groups.

    Systems other than Linux do not report free memory; there it returns the memory of the machine.
    """
    info = pathlib.Path(root) / "proc/meminfo"
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (line.split() for line in info.read_text().splitlines())
    free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    for folder, version in cores.control_groups(root, "memory"):
        limit, used, prefix = _CGROUP_FILES[version]
        if not (folder / limit).exists():  # outside of a container, or the root group
            continue
        bound = (folder / limit).read_text().strip()
        if bound != "max":
            stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))  # counts as free
            free = min(free, int(bound) - int((folder / used).read_text()) + cached)
    return free


# version -> files of the limit and of the used bytes, prefix of the figures that include inner groups
_CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}
