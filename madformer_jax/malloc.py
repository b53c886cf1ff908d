"""The C library's allocator (glibc's; nothing happens where there is another): docs/performance.md, docs/scaling.md."""

import ctypes
import os
import sys

TUNABLES = "glibc.malloc.hugetlb=1"


def tune() -> None:
    """Starts this process anew with `TUNABLES`, which are read at the start only, unless it has settings of its own.

    Large pages for large arrays take a tenth off a training step on a CPU.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim() -> None:
    """Gives back to the system what threads have freed, of which they keep a share each."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
