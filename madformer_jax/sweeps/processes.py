"""Processes that share the runs of a sweep on the cores of one machine.

On a CPU, two processes on a core each train small models a third faster than one process on both
cores (docs/engineering_log.md). `modes.sweep` makes what the runs share, and then calls `run`. Each
process executes the same command with `--processes=1` and claims free runs like a process of any
other machine. It writes its log to `logs/HOST_NUMBER.log` in the sweep's folder.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from absl import logging

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import cores, memory, storage, xla_flags

AUTO = "auto"
PARENT_VARIABLE = "MADFORMER_PARENT"  # process id of the process that started this one
INDEX_VARIABLE = "MADFORMER_INDEX"  # index of this process among all processes of the sweep
PROCESS_BYTES = int(2.5 * 2**30)  # memory of a process that trains and evaluates digits (2.3 GiB at most)
POLL_SECONDS = 0.2  # between two checks of the processes
PROGRESS_SECONDS = 5.0  # between two checks of the runs
REPORT_SECONDS = 60.0  # between two log lines about the runs
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
_PR_SET_PDEATHSIG = 1  # of prctl.h


class Child(NamedTuple):
    """A started process and the file of its log."""

    number: int
    process: subprocess.Popen[bytes]
    log: str


def choose_count(setting: str, runs: int, platform: str, jax_processes: int) -> int:
    """Returns how many processes share the runs that are not done.

    Args:
      setting: The value of --processes. "auto" is one process for each core of a CPU, as far as the
        memory suffices, and one process on other platforms.
      platform: JAX's platform.
      jax_processes: Number of JAX processes of this job.

    Raises:
      ConfigError: The setting is neither "auto" nor a positive number, or several processes would need
        the same accelerator or cluster.
    """
    several_fit = platform == "cpu" and jax_processes == 1
    if setting == AUTO:
        available = min(len(cores.affinity()), cores.quota(), memory.host_free_bytes() // PROCESS_BYTES)
        count = int(available) if several_fit else 1
    elif not setting.isdecimal() or int(setting) < 1:
        raise ConfigError(f"--processes={setting} must be 'auto' or a number of processes, at least 1.")
    else:
        count = int(setting)
    if count > 1 and not several_fit:
        job = f"{jax_processes} JAX processes" if jax_processes > 1 else f"platform {platform!r}"
        raise ConfigError(f"--processes={setting} is for one CPU, and this is a job with {job}: use --processes=1.")
    return max(1, min(count, runs))


def index() -> int:
    """Returns the index of this process in a job array, `MADFORMER_INDEX`; 0 if the variable is not set.

    Raises:
      ConfigError: The variable is not a number.
    """
    text = os.environ.get(INDEX_VARIABLE) or "0"
    if not text.isdecimal():
        raise ConfigError(f"{INDEX_VARIABLE}={text!r} must be the index of this process in its job array, such as 0.")
    return int(text)


def single_process_command(argv: Sequence[str]) -> list[str]:
    """Returns the command of one process for the arguments of this one; argv[0] is the program."""
    return [sys.executable, "-m", "madformer_jax.main", *argv[1:], "--processes=1"]


def run(command: Sequence[str], workdir: str, count: int, runs: int, progress: Callable[[], tuple[int, str]]) -> bool:
    """Starts the processes and waits until all have ended.

    SIGTERM, SIGHUP and Ctrl-C are passed on as SIGTERM, after which a training saves and ends. A
    second Ctrl-C kills the processes.

    Args:
      command: The command of a process, see `single_process_command`.
      progress: Returns the number of finished runs and a log line about all runs. The line is logged
        when the number changes, and each minute.

    Returns:
      False if the processes were asked to stop before all runs were done.

    Raises:
      ConfigError: Runs are not done, because they failed or because processes ended early.
    """
    children: list[Child] = []
    with _pass_on_signals(children) as stopping:
        try:
            _start(children, command, workdir, count)
            if stopping:  # the signal may have come between two starts
                _send(children, signal.SIGTERM)
            failures = _wait(children, progress, stopping)
        finally:
            for child in children:
                child.process.kill()  # does nothing to a process that has ended
                child.process.wait()
    done, line = progress()
    logging.info("%s", line)
    if done == runs:
        return True
    if stopping:
        logging.info("asked to stop: the same command continues")
        return False
    reason = next(iter(failures.values()), "none reports an error.")
    raise ConfigError(
        f"{runs - done} of {runs} runs are not done, and {len(failures)} of {count} processes ended early: {reason} The "
        "same command continues with these runs."
    )


def end_with_parent() -> None:
    """Sends this process SIGTERM when the process that started it for a sweep ends (Linux)."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


def _start(children: list[Child], command: Sequence[str], workdir: str, count: int) -> None:
    allowed = cores.affinity()
    # Under a quota below the number of cores, other containers may use the same cores.
    pinned = len(allowed) > 1 and cores.quota() >= len(allowed)
    log_folder = (
        tempfile.mkdtemp(prefix="madformer_sweep_") if storage.is_remote(workdir) else os.path.join(workdir, "logs")
    )
    with storage.wrap_errors(f"{log_folder} cannot be written"):
        os.makedirs(log_folder, exist_ok=True)
    logging.info("%d processes%s; their logs: %s", count, ", each on a core of its own" if pinned else "", log_folder)
    try:
        for number in range(count):
            if pinned:  # a started process inherits it
                os.sched_setaffinity(0, {allowed[number % len(allowed)]})
            log = os.path.join(log_folder, f"{socket.gethostname()}_{number}.log")
            with open(log, "ab") as file:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=_environment(number, count),
                    start_new_session=True,  # Ctrl-C in the terminal reaches this process alone
                )  # fmt: skip
            children.append(Child(number, process, log))
    finally:
        if pinned:
            os.sched_setaffinity(0, allowed)


def _environment(number: int, count: int) -> dict[str, str]:
    user_flags = os.environ.get("XLA_FLAGS", "")
    # The flag is also part of the keys of stored programs: those of a core have no code for several.
    flag = "" if _ONE_THREAD.partition("=")[0] in user_flags else xla_flags.supported(_ONE_THREAD)
    return os.environ | {
        INDEX_VARIABLE: str(index() * count + number),
        PARENT_VARIABLE: str(os.getpid()),
        "XLA_FLAGS": f"{flag} {user_flags}".strip(),
    }


def _wait(
    children: Sequence[Child], progress: Callable[[], tuple[int, str]], stopping: Sequence[int]
) -> dict[int, str]:
    """Waits for the processes and logs the progress.

    Returns:
      Number of each process that failed -> its error line.
    """
    failures: dict[int, str] = {}
    running, last_done, checked_at, reported_at = list(children), -1, 0.0, 0.0
    while running:
        for child in [child for child in running if child.process.poll() is not None]:
            running.remove(child)
            status = child.process.returncode
            if status and not (stopping and status in (-signal.SIGTERM, -signal.SIGKILL)):
                failures[child.number] = reason = _describe_failure(child)
                logging.error("process %d of the sweep ended early: %s Its log: %s", child.number, reason, child.log)
        now = time.monotonic()
        if now - checked_at >= PROGRESS_SECONDS:
            checked_at = now
            try:
                done, line = progress()
            except ConfigError as error:  # A file that cannot be read now is no reason to end the processes.
                done, line = last_done, str(error)
            if done != last_done or now - reported_at >= REPORT_SECONDS:
                last_done, reported_at = done, now
                logging.info("%s", "waiting for the processes to save and end" if stopping else line)
        time.sleep(POLL_SECONDS if running else 0)
    return failures


def _describe_failure(child: Child) -> str:
    """Returns the error line of a process's log or its last line, and the signal that ended it."""
    status = child.process.returncode
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}."
    with open(child.log, "rb") as file:
        file.seek(max(0, os.path.getsize(child.log) - 10_000))
        lines = file.read().decode(errors="replace").split("\n")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or [f"its status is {status}."])[-1]


def _send(children: Sequence[Child], number: int) -> None:
    for child in children:
        child.process.send_signal(number)  # does nothing to a process that has ended


@contextlib.contextmanager
def _pass_on_signals(children: Sequence[Child]) -> Iterator[list[int]]:
    """Passes signals to the processes. Yields the list of signals so far."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        repeated = number == signal.SIGINT and signal.SIGINT in received
        received.append(number)
        _send(children, signal.SIGKILL if repeated else signal.SIGTERM)

    caught = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    previous_handlers = {number: signal.signal(number, pass_on) for number in caught}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
