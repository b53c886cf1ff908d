"""Signals that ask a run to stop, from a cluster that takes the machine away or from a user.

Training and other long modes check `Preemption.reached` between steps, or wrap work in `interruptible`.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils

T = TypeVar("T")
# JAX's sync point identifies calls by number, so each number may occur once.
_call_ids = itertools.count(1)


class Preemption:
    """Context manager that catches SIGTERM, SIGHUP, SIGINT (Ctrl-C) and the cluster's notice to JAX.

    `reached` then returns True in all processes at the same call. A second Ctrl-C ends the process.
    SIGHUP is sent when a terminal is closed; a process that ignores it (`nohup`) continues to ignore it.
    """

    def __init__(self) -> None:
        # With several processes, JAX's own notifier handles SIGTERM and informs the others.
        self._single_process = jax.process_count() == 1
        self._noticed = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        if self._single_process:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._notice)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._terminate)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed.set()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not to the log, which may be locked in a signal handler.
        os.write(2, b"stopping after this step; Ctrl-C again leaves at once, without saving\n")
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Returns whether to save and exit. Every process must call it equally often."""
        several = not self._single_process and not self._noticed.is_set()
        if several and multihost_utils.reached_preemption_sync_point(next(_call_ids)):
            self._noticed.set()
        return self._noticed.is_set()


def exit_on_sigterm() -> None:
    """Lets SIGTERM end this process, though `jax.distributed.initialize` has installed JAX's notifier for it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """Yields items of work that the same command can resume. Every process must take equally many.

    A signal ends a single process at once. With several processes, all end together between two items,
    because those that remained would wait for ever.

    Raises:
      KeyboardInterrupt: The processes are asked to stop.
    """
    if jax.process_count() == 1:
        yield from items
        return
    with Preemption() as stopping:
        for item in items:
            yield item
            if stopping.reached():
                logging.info("asked to stop: the same command continues from the finished parts")
                raise KeyboardInterrupt
