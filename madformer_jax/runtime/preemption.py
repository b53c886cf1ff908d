"""Notice that a run is to stop: from the machine that is about to be taken away, or from a person."""

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
# JAX's sync point names the number of the call at which all processes stop: none may come twice.
_call_ids = itertools.count(1)


class Preemption:
    """Hears SIGTERM, SIGHUP, the cluster's notice through JAX's sync point, and Ctrl-C (SIGINT); a second Ctrl-C ends the process.

    SIGHUP comes when a terminal is closed. A process that ignores it (`nohup`) goes on to ignore it.

    A context manager; `reached()` says, in all processes at the same call, that it is time to save and leave.
    """

    def __init__(self) -> None:
        # With several processes, JAX's own notifier takes SIGTERM and tells the others.
        self._alone = jax.process_count() == 1
        self._noticed = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        if self._alone:
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
        os.write(
            2, b"stopping behind this step; Ctrl-C again leaves at once, without saving\n"
        )  # a log may be locked here
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to save and leave; once true, it stays so. Every process calls it equally often."""
        if (
            not self._alone
            and not self._noticed.is_set()
            and multihost_utils.reached_preemption_sync_point(next(_call_ids))
        ):
            self._noticed.set()
        return self._noticed.is_set()


def exit_on_sigterm() -> None:
    """SIGTERM ends this process at once: `jax.distributed.initialize` has given the signal to JAX's notifier, which only notes it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """The items, for work that the same command goes on with; every process takes equally many.

    A signal ends a single process there and then. Several do not hear SIGTERM, which JAX's notifier takes, and one that
    ended alone would leave the others waiting: they end together, between two items.

    Raises:
      KeyboardInterrupt: they are to stop.
    """
    if jax.process_count() == 1:
        yield from items
        return
    with Preemption() as stopping:
        for item in items:
            yield item
            if stopping.reached():
                logging.info("asked to stop: the same command goes on from what is finished")
                raise KeyboardInterrupt
