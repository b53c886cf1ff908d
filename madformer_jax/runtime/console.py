"""Printing text for people, and quoting for a shell."""

import os
import shlex
import sys


def print_text(text: str) -> None:
    """Prints text. A closed standard output (`--help | head`) is ignored from then on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python prints an error at exit


def shell_quote(argument: str) -> str:
    """Returns an argument `--name=value` quoted for a shell."""
    name, equals, value = argument.partition("=")
    return f"{name}{equals}{shlex.quote(value)}"
