"""What a user did wrong, in one line."""


class ConfigError(ValueError):
    """A wrong setting or wrong input, told in one line: what is wrong, what was given, what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
