"""Whether a state fits into memory, looked at before any of it is made."""

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
    """Refuses what cannot fit: the devices of this process must hold `trees`, and more while they compute.

    Args:
      purpose: what for, as the message begins: "training", "sampling".
      trees: abstract arrays with shardings, by what they are: parameters, optimizer, ...

    Raises:
      ConfigError: it says what is needed, what there is, and what to change.
    """
    devices = mesh.local_devices
    stats = devices[0].memory_stats() or {}
    needed = {name: partitioning.device_bytes(tree) for name, tree in trees.items()}
    if "bytes_limit" in stats:
        free, place = stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"a {devices[0].device_kind}"
    else:  # devices that live in the host's memory, and share it
        free, place = host_free_bytes(), "this machine"
        needed = {name: size * len(devices) for name, size in needed.items()}
    check_bytes(purpose, needed, free, place)


def device_capacity() -> int:
    """Bytes of a device of this process; 0 on a CPU, whose devices share one memory."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def check_bytes(purpose: str, needed: dict[str, int], free: int, place: str) -> None:
    """Compares bytes.

    Raises:
      ConfigError: more is needed than is free.
    """
    total = sum(needed.values())
    if total > free:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
        raise ConfigError(
            f"{purpose} needs {total / GIB:.2f} GiB ({parts}) before it computes anything, but {place} has "
            f"{free / GIB:.2f} GiB free: make config.model smaller, spread it over more devices (config.mesh.fsdp and "
            "config.mesh.tensor must divide its widths: the log says what they do not), or end what else uses the memory."
        )


def host_free_bytes(root: str = "/") -> int:
    """Bytes that this process can still take without swapping: of the machine and of the control groups it is in.

    Where the system does not tell what is free (it is no Linux), all that it has.
    """
    top = pathlib.Path(root)
    info = top / "proc/meminfo"
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (line.split() for line in info.read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    return min([available, *_cgroup_free_bytes(top)])


def _cgroup_free_bytes(top: pathlib.Path) -> Iterator[int]:
    """Bytes left in each control group (version 1 or 2) that limits this process; the page cache in it can be had back."""
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
            if not (folder / limit).exists():  # outside of a container, or the root
                continue
            bound = (folder / limit).read_text().strip()
            if bound != "max":
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
                yield int(bound) - int((folder / used).read_text()) + cached
