"""Text for a person: printed, and quoted for a shell."""

import os
import shlex
import sys


def print_text(text: str) -> None:
    """Prints text. If nobody reads standard output any more (`--help | head`), nothing is printed from here on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends


def shell_quote(argument: str) -> str:
    """`--name=value` as it is pasted into a shell."""
    name, equals, value = argument.partition("=")
    return f"{name}{equals}{shlex.quote(value)}"
