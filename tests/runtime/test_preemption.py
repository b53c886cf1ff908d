"""Preemption in one process; tests/test_distributed.py tests several processes with real signals."""

import itertools
import os
import signal

import jax
import pytest

from madformer_jax.runtime import preemption
from madformer_jax.runtime.preemption import Preemption, interruptible


@pytest.fixture
def stopped_at(monkeypatch):
    """Simulates two processes that JAX stops at calls of its sync point.

    Returns the list of the calls that stop them, and the list of the numbers passed to all calls.
    """
    at, numbers = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils,
        "reached_preemption_sync_point",
        lambda number: numbers.append(number) or len(numbers) in at,
    )
    return at, numbers


def test_processes_end_between_two_items_and_give_no_number_twice(stopped_at):
    at, numbers = stopped_at
    at.append(8)
    with Preemption() as stopping:  # of a training before
        assert not stopping.reached()
    assert list(interruptible("abc")) == ["a", "b", "c"]  # a part of an evaluation
    taken = []
    with pytest.raises(KeyboardInterrupt):
        taken.extend(interruptible(itertools.count()))
    assert taken == [0, 1, 2, 3]
    assert len(numbers) == 8 and all(a < b for a, b in itertools.pairwise(numbers))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_of_one_of_several_processes_is_a_notice_to_all(stopped_at, monkeypatch, number):
    """It becomes SIGTERM, which JAX's notifier hears. The earlier handler is back afterwards."""
    heard, before = [], signal.getsignal(number)
    monkeypatch.setattr(os, "kill", lambda process, number: heard.append(number))
    for i in interruptible(range(3)):
        if i == 1:
            signal.raise_signal(number)
            signal.signal(number, signal.SIG_IGN)  # not for the rest of the tests
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(number) is before


def test_a_single_process_keeps_its_signals():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in interruptible(range(2)):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_notice_unless_it_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # `nohup` ignores it
    try:
        with Preemption() as stopping:
            signal.raise_signal(signal.SIGHUP)
            assert stopping.reached() is not ignored
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
