"""Processes that share a sweep on one machine, with a short script in place of the command."""

import math
import os
import signal
import sys
import threading
import time

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import cores
from madformer_jax.sweeps import processes

RUNS = 4
# Claims runs as a sweep does and takes a moment for each, unless `how` says otherwise.
SCRIPT = """
import os, pathlib, signal, sys, time

folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
number = os.environ["MADFORMER_INDEX"]
(folder / f"cores_{number}").write_text(str(os.sched_getaffinity(0)))
if how == "the second dies" and number == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "both fail":
    sys.exit("error: the loss is not finite.")
while how == "both wait":
    time.sleep(0.01)
for i in range(4):
    try:
        (folder / f"run_{i}").mkdir()
    except FileExistsError:
        continue
    time.sleep(0.1)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(processes, "PROGRESS_SECONDS", 0.02)

    unreadable = [ConfigError("result.json cannot be read: Stale file handle.")]  # at first

    def progress():
        if unreadable:
            raise unreadable.pop()
        return len(list(tmp_path.glob("run_*"))), "progress"

    return lambda how: processes.run([sys.executable, "-c", SCRIPT, tmp_path, how], str(tmp_path), 2, RUNS, progress)


def test_each_process_has_a_core_and_all_runs_get_done(start, tmp_path):
    allowed = os.sched_getaffinity(0)
    assert start("")
    used = {path.read_text() for path in tmp_path.glob("cores_*")}
    pinned = len(allowed) >= 2 and processes.cores.quota() >= len(allowed)
    assert len(used) == (2 if pinned else 1)
    assert os.sched_getaffinity(0) == allowed


def test_a_killed_process_is_reported_and_the_other_does_its_runs(start, caplog):
    assert start("the second dies")
    assert "process 1 of the sweep ended early: it was ended by SIGKILL." in caplog.text


def test_the_error_of_the_processes_is_that_of_the_sweep(start):
    with pytest.raises(ConfigError, match="4 of 4 runs are not done, and 2 of 2 .*: the loss is not finite. The same"):
        start("both fail")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes(start, tmp_path, number):
    def interrupt():
        while len(list(tmp_path.glob("cores_*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    assert not start("both wait")
    assert signal.getsignal(number) == handler


def test_a_process_without_its_parent_ends(monkeypatch):
    sent = []
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: None)
    for parent in (os.getppid(), -1):
        monkeypatch.setenv(processes.PARENT_VARIABLE, str(parent))
        processes.end_with_parent()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_auto_is_a_process_for_each_core_of_a_cpu(monkeypatch):
    monkeypatch.setattr(cores, "affinity", lambda: list(range(16)))
    monkeypatch.setattr(cores, "quota", lambda: math.inf)
    monkeypatch.setattr(processes.memory, "host_free_bytes", lambda: 8 * processes.PROCESS_BYTES + 1)
    assert processes.choose_count("auto", 45, "cpu", 1) == 8  # of the memory
    assert processes.choose_count("auto", 3, "cpu", 1) == 3  # a process without a run would only wait
    assert processes.choose_count("auto", 45, "gpu", 1) == processes.choose_count("auto", 45, "cpu", 2) == 1
    monkeypatch.setattr(cores, "quota", lambda: 2.5)
    assert processes.choose_count("auto", 45, "cpu", 1) == 2
    assert processes.choose_count("4", 45, "cpu", 1) == 4
    with pytest.raises(ConfigError, match="--processes=4 is for one CPU, and this is a job with platform 'gpu'"):
        processes.choose_count("4", 45, "gpu", 1)
    for wrong in ("0", "-1", "many"):
        with pytest.raises(ConfigError, match=f"--processes={wrong} must be 'auto' or a number"):
            processes.choose_count(wrong, 45, "cpu", 1)


def test_the_quota_is_the_smallest_of_the_control_groups(tmp_path):
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    assert cores.quota(str(tmp_path)) == math.inf
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert cores.quota(str(tmp_path)) == 2.5
    old = tmp_path / "sys/fs/cgroup/cpu/job"
    old.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/job\n")
    (old / "cpu.cfs_quota_us").write_text("150000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.quota(str(tmp_path)) == 1.5
