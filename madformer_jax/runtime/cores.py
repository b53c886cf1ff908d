"""CPU cores that this process may use: those of its affinity mask, within the quotas of its control groups."""

import math
import os
import pathlib
from collections.abc import Iterator


def affinity() -> list[int]:
    """Returns the numbers of the cores that the scheduler may give to this process; [] if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def quota(root: str = "/") -> float:
    """Returns the CPU quota of the control groups (version 1 or 2), in cores; infinity without a limit."""
    quotas = [math.inf]
    for folder, version in control_groups(root, "cpu"):
        files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # microseconds
        try:
            limit, period = " ".join((folder / name).read_text() for name in files).split()
        except OSError:  # outside of a container, or the root group
            continue
        if limit.isdigit():  # "max" and "-1" are no limit
            quotas.append(int(limit) / int(period))
    return min(quotas)


def control_groups(root: str, controller: str) -> Iterator[tuple[pathlib.Path, int]]:
    """Yields the folders of this process's control groups of a controller, and their version, 1 or 2."""
    top = pathlib.Path(root)
    groups = top / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if not kinds or controller in kinds.split(","):
            base = top / "sys/fs/cgroup" / (controller if kinds else "")
            group = pathlib.PurePosixPath(path.lstrip("/"))
            yield from ((base / folder, 1 if kinds else 2) for folder in (group, *group.parents))
