"""Suppression of log lines of Orbax, whose errors reach `runtime.checkpoint` as exceptions."""

import functools
import logging as python_logging
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import logging

_ORBAX_PATH = os.path.join("orbax", "checkpoint")


def suppress() -> None:
    """Removes log lines of Orbax and of its event loop, whose errors are also raised as exceptions."""
    for logger in (logging.get_absl_logger(), python_logging.getLogger("asyncio")):
        if _is_not_orbax not in logger.filters:
            logger.addFilter(_is_not_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _show_unless_late:
        sys.unraisablehook = functools.partial(_show_unless_late, sys.unraisablehook)


def _show_unless_late(show: Callable[[Any], Any], unraisable: Any) -> None:
    """Shows an exception that could not be raised, unless it is a late error of Orbax after a first one."""
    code = getattr(unraisable.object, "cr_code", None)
    late = str(unraisable.exc_value) == "Event loop is closed" or (code is not None and _ORBAX_PATH in code.co_filename)
    if not late:
        show(unraisable)


def _is_not_orbax(record: python_logging.LogRecord) -> bool:
    return record.name != "asyncio" and _ORBAX_PATH not in record.pathname
