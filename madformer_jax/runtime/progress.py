"""Log lines during long operations, such as compiling a program or listing a data set."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

INTERVAL_SECONDS = 10.0


@contextlib.contextmanager
def log_while(activity: str) -> Iterator[None]:
    """Logs every `INTERVAL_SECONDS` how long an operation has taken so far."""
    began, finished = time.monotonic(), threading.Event()

    def log() -> None:
        while not finished.wait(INTERVAL_SECONDS):
            logging.info("%s: %.0f s so far", activity, time.monotonic() - began)

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def log_compilation(function: Callable[..., Any], activity: str) -> Callable[..., Any]:
    """Returns a jitted function whose first call, which compiles it, is logged."""
    compiled = False

    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled:
            return function(*args)
        began = time.monotonic()
        logging.info("compiling %s", activity)
        with log_while(f"compiling {activity}"):
            out = jax.block_until_ready(function(*args))
        compiled = True
        logging.info("compiled %s and ran it in %.1f s", activity, time.monotonic() - began)
        return out

    return call
