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
    return min(_quotas(pathlib.Path(root)), default=math.inf)


def _quotas(top: pathlib.Path) -> Iterator[float]:
    groups = top / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        base = top / ("sys/fs/cgroup/cpu" if kinds else "sys/fs/cgroup")
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for folder in (base / part for part in (group, *group.parents)):
            limit, period = _read_limit(folder, version=1 if kinds else 2)
            if limit.isdigit():  # "max" and "-1" are no limit
                yield int(limit) / int(period)


def _read_limit(folder: pathlib.Path, version: int) -> list[str]:
    """Returns the microseconds of CPU time in each period, and the period, as the files of a group state them."""
    files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        return " ".join((folder / name).read_text() for name in files).split()
    except OSError:  # outside of a container, or the root group
        return ["max", "1"]
