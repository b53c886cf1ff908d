"""Work that processes of a sweep do once for all of them. `modes.sweep` makes judges and timings with it."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from madformer_jax.runtime import lock
from madformer_jax.sweeps import sweep_folder

POLL_SECONDS = 10.0  # interval at which a process checks what other processes work on


def make_once(workdir: str, name: str, path: str, make: Callable[[], Any]) -> None:
    """Makes a file once: one process calls `make`, which writes `path`, and the others wait."""
    while not _exists(path):
        try:
            with lock.acquire(sweep_folder.claim_path(workdir, name)):
                if not _exists(path):
                    make()
        except lock.LockedError:
            logging.info("waiting for another process to make %s", path)
            time.sleep(POLL_SECONDS)


def _exists(path: str) -> bool:
    return broadcast(jax.process_index() == 0 and epath.Path(path).exists())


def broadcast(value: bool) -> bool:
    """Returns the first JAX process's value in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value
