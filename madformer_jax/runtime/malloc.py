"""The C library's allocator (glibc's; nothing happens where there is another): docs/performance.md, docs/scaling.md."""

import ctypes
import os
import sys

TUNABLES = "glibc.malloc.hugetlb=1"


def restart_with_tunables() -> None:
    """Starts this process anew with `TUNABLES`, which are read at the start only, unless it has settings of its own.

    Large pages for large arrays take a tenth off a training step on a CPU.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim() -> None:
    """Gives back to the system what threads have freed, of which they keep a share each."""
    _call_glibc("malloc_trim", 0)


def retain_memory() -> None:
    """Lets the memory of past batches be kept for the next ones, where data is read.

    By default it goes back to the system at once, and fresh pages then cost more than the reading itself: a worker that
    reads 256 KiB records is twice as fast with this (docs/data.md).
    """
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, 256 * 2**20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _call_glibc(name: str, *args: int) -> None:
    """Calls a function of glibc, where that is the C library."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another one; Windows has none
        return
    function(*args)
