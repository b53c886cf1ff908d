"""Settings of glibc's allocator (docs/engineering_log.md, docs/scaling.md). With other C libraries they do nothing."""

import ctypes
import os
import sys

TUNABLES = "glibc.malloc.hugetlb=1"


def restart_with_tunables() -> None:
    """Restarts this process with `TUNABLES`, which glibc reads at the start, unless the user has set tunables.

    Huge pages for large arrays make a training step on a CPU ten per cent faster.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim() -> None:
    """Returns freed memory to the system. glibc keeps some of it for each thread."""
    _call_glibc("malloc_trim", 0)


def keep_batch_memory() -> None:
    """Keeps the memory of freed batches for the next ones, in processes that read data.

    By default it returns to the system at once, and new pages cost more than reading: a worker that reads
    256 KiB records is twice as fast with this setting (docs/data.md).
    """
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, 256 * 2**20)


def keep_all_memory() -> None:
    """Keeps freed memory, in processes that compute on a CPU.

    A program allocates its temporary arrays at every call. By default they return to the system at the end
    of the call, and the system fills new pages with zeros at the next one. glibc still returns arrays above
    64 MiB of all threads but the first (docs/engineering_log.md). `trim` returns all memory. The user's own
    tunables take precedence.
    """
    if os.environ.get("GLIBC_TUNABLES") != TUNABLES:
        return
    _call_glibc("mallopt", _M_MMAP_MAX, 0)  # no allocation has a mapping of its own
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, -1)  # never


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h


def _call_glibc(name: str, *args: int) -> None:
    """Calls a function of glibc, if that is the C library."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library
        return
    function(*args)
