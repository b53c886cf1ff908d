"""Keeps JAX out of grain's worker processes, and workers out of the way when training dies.

Importing grain imports JAX where it is installed, and a spawned process first imports the parent's main module, which
imports it again. So a grain worker gets this module as its main module instead: run as `__mp_main__`, it refuses
`import jax` before anything else is imported. grain then uses its fallbacks, which our pipeline's plain dicts of arrays
are made for.
"""

import importlib.machinery
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from madformer_jax.runtime import malloc


class _JaxImportBlocker:
    """Import hook to which JAX does not exist."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(
                f"{name}: data workers must not import JAX (madformer_jax/data/worker.py)", name=name
            )


_spawn_lock = threading.Lock()


class _WorkerProcess(multiprocessing.context.SpawnProcess):
    """A spawned process; if grain starts it, this module stands in for its main module."""

    def start(self) -> None:
        if not self.name.startswith("grain-"):
            return super().start()
        main: Any = sys.modules["__main__"]
        with _spawn_lock:
            spec = main.__spec__
            main.__spec__ = importlib.machinery.ModuleSpec(__name__, None)  # what multiprocessing passes to the child
            try:
                super().start()
            finally:
                main.__spec__ = spec


def block_jax_in_workers() -> None:
    """From now on, workers that grain starts in this process cannot import JAX."""
    multiprocessing.get_context("spawn").Process = _WorkerProcess  # type: ignore[misc]


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only runs in a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def init_worker(index: int, count: int) -> None:
    """Grain's `worker_init_fn`: Ctrl-C is the parent's to handle, and a killed parent leaves no orphans."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    malloc.retain_memory()
    threading.Thread(target=_exit_with_parent, daemon=True, name="exit-with-parent").start()


if __name__ == "__mp_main__":
    sys.meta_path.insert(0, _JaxImportBlocker())
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # else each worker warns that it has no JAX profiler
    import grain  # noqa: F401

    logging.set_verbosity(verbosity)
