"""grain's worker processes: kept free of JAX, and stopped when training dies.

`pipeline` calls `block_jax_in_workers` and passes `init_worker` to grain.

grain imports JAX if it is installed, and a spawned process imports the parent's main module, which
imports JAX as well. A grain worker therefore gets this module as its main module. Run as
`__mp_main__`, it refuses `import jax` before anything else is imported. grain then uses its
fallbacks without JAX, which support the pipeline's batches because they are plain dicts of arrays.
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
    """Import hook that makes every import of JAX fail."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(
                f"{name}: data workers must not import JAX (madformer_jax/data/worker.py)", name=name
            )


_spawn_lock = threading.Lock()


class _WorkerProcess(multiprocessing.context.SpawnProcess):
    """A spawned process. If grain starts it, its main module is this one."""

    def start(self) -> None:
        if not self.name.startswith("grain-"):
            return super().start()
        main: Any = sys.modules["__main__"]
        with _spawn_lock:
            spec = main.__spec__
            main.__spec__ = importlib.machinery.ModuleSpec(__name__, None)  # multiprocessing passes it to the child
            try:
                super().start()
            finally:
                main.__spec__ = spec


def block_jax_in_workers() -> None:
    """Prevents workers that grain starts from this process from importing JAX."""
    multiprocessing.get_context("spawn").Process = _WorkerProcess  # type: ignore[misc]


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only runs in a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def init_worker(index: int, count: int) -> None:
    """Initializes a worker (grain's `worker_init_fn`).

    The worker ignores Ctrl-C, which the parent handles, and exits when the parent is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    malloc.keep_batch_memory()
    threading.Thread(target=_exit_with_parent, daemon=True, name="exit-with-parent").start()


if __name__ == "__mp_main__":
    sys.meta_path.insert(0, _JaxImportBlocker())
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # hides each worker's warning that it has no JAX profiler
    import grain  # noqa: F401

    logging.set_verbosity(verbosity)
