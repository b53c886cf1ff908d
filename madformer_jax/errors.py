"""What a user did wrong, in one line."""

import os


class ConfigError(ValueError):
    """A wrong setting or wrong input, told in one line: what is wrong, what was given, what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def leave(*_: object) -> None:
    """What Ctrl-C does before anything has begun; a handler of SIGINT."""
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(130)
