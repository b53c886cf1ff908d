"""Checks that parameters and optimizer state fit into memory, before they are allocated.

Training, sampling and evaluation call `check_state_fits`.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import partitioning

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
    stats = devices[0].memory_stats() or {}
    needed = {name: partitioning.device_bytes(tree) for name, tree in trees.items()}
    if "bytes_limit" in stats:
        free, location = stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"a {devices[0].device_kind}"
    else:  # CPU devices share the memory of the host
        free, location = host_free_bytes(), "this machine"
        needed = {name: size * len(devices) for name, size in needed.items()}
    check_bytes(purpose, needed, free, location)


def free_bytes(mesh: Mesh) -> int:
    """Returns the free bytes of a device of this process. The devices of a CPU share those of the host."""
    devices = mesh.local_devices
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return host_free_bytes() // len(devices)


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
    top = pathlib.Path(root)
    info = top / "proc/meminfo"
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (line.split() for line in info.read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    return min([available, *_cgroup_free_bytes(top)])


def _cgroup_free_bytes(top: pathlib.Path) -> Iterator[int]:
    """Yields the free bytes of each control group (version 1 or 2) of this process.

    Page cache counts as free.
    """
    groups = top / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            base, limit, used, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in kinds.split(","):
            base, limit, used, prefix = (
                "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            )  # fmt: skip
        else:
            continue
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for folder in (top / base / part for part in (group, *group.parents)):
            if not (folder / limit).exists():  # outside of a container, or the root group
                continue
            bound = (folder / limit).read_text().strip()
            if bound != "max":
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
                yield int(bound) - int((folder / used).read_text()) + cached
