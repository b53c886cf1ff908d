"""Log lines during long operations."""

import threading

import pytest
from absl import logging

from madformer_jax.runtime import progress


@pytest.fixture
def lines(monkeypatch):
    """The lines logged, and an event that is set once two of them report progress."""
    said, twice = [], threading.Event()

    def info(text, *args):
        said.append(text % args)
        if sum("so far" in line for line in said) >= 2:
            twice.set()

    monkeypatch.setattr(logging, "info", info)
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.01)
    return said, twice


def test_the_first_call_is_logged_while_it_lasts_and_the_others_are_not(lines):
    said, twice = lines

    def program(x):
        assert twice.wait(20)
        return x + 1

    call = progress.log_compilation(program, "the step")
    assert call(1) == 2
    assert said[0] == "compiling the step"
    assert said[1].startswith("compiling the step: ") and said[1].endswith(" s so far")
    assert said[-1].startswith("compiled the step and ran it in ")
    count = len(said)
    assert call(2) == 3 and len(said) == count


def test_nothing_is_logged_after_an_error(lines):
    said, twice = lines

    def read():
        with progress.log_while("reading"):
            assert twice.wait(20)
            raise OSError

    with pytest.raises(OSError):
        read()
    count = len(said)
    assert not threading.Event().wait(0.03) and len(said) == count
