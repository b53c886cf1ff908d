"""Notice that a run is to stop: from the machine that is about to be taken away, or from a person."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Hears SIGTERM, the cluster's notice through JAX's sync point, and Ctrl-C (SIGINT), of which a second one ends the process.

    A context manager; `reached()` says, in all processes at the same call, that it is time to save and leave.
    """

    def __init__(self) -> None:
        # With several processes, JAX's own notifier takes SIGTERM and tells the others.
        self._alone = jax.process_count() == 1
        self._noticed = threading.Event()
        self._calls = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        if self._alone:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed.set()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(
            2, b"stopping behind this step; Ctrl-C again leaves at once, without saving\n"
        )  # a log may be locked here
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to save and leave; once true, it stays so. Every process calls it equally often."""
        self._calls += 1
        if (
            not self._alone
            and not self._noticed.is_set()
            and multihost_utils.reached_preemption_sync_point(self._calls)
        ):
            self._noticed.set()
        return self._noticed.is_set()
