"""Settings of the C library's allocator, which it reads when a process starts."""

import os
import sys

TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"


def tune() -> None:
    """Starts this process anew with `TUNABLES`, unless it has settings of its own.

    Large pages for large arrays take a tenth off a training step on a CPU. Two arenas, not eight a core, keep what the many
    threads of a save have freed from staying with each of them. Both are measured in docs/performance.md.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
