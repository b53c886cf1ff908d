"""Errors that a user can correct, and helpers for one-line messages. Every package may import this module."""

import os


class ConfigError(ValueError):
    """Wrong setting or input. The message has one line: what is wrong, the value, what to do."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def leave(*_: object) -> None:
    """Ends the process at once; the handler of SIGINT until a mode runs."""
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(130)
