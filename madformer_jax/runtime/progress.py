"""Says of what takes long that it goes on: a program that compiles, a data set that is listed."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

INTERVAL_SECONDS = 10.0  # seconds


@contextlib.contextmanager
def log_while(what: str) -> Iterator[None]:
    """Logs every `EVERY` seconds for how long `what` has been under way."""
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(INTERVAL_SECONDS):
            logging.info("%s: %.0f s so far", what, time.monotonic() - began)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def log_compilation(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The jitted function, of which the first call, which compiles it, is told while it lasts and when it is done."""
    compiled = False

    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled:
            return function(*args)
        began = time.monotonic()
        logging.info("compiling %s", what)
        with log_while(f"compiling {what}"):
            out = jax.block_until_ready(function(*args))
        compiled = True
        logging.info("compiled %s and ran it in %.1f s", what, time.monotonic() - began)
        return out

    return call
