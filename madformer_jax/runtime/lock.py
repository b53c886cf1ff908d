"""One writer a workdir: a file `lock.json` in it that tells who writes, and that it still lives.

On the machine that wrote it a lock is stale when its process is gone. From elsewhere (another machine, a container, a bucket)
it is stale when it does not change while we watch: clocks are not compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

FILE_NAME = "lock.json"
HEARTBEAT_SECONDS = 15.0  # seconds between two signs of life
STALE_SECONDS = 90.0  # seconds without one after which a process elsewhere is taken for dead


class LockedError(ConfigError):
    """Somebody else has the workdir."""


@contextlib.contextmanager
def acquire(workdir: str) -> Iterator[Callable[[], None]]:
    """Holds the workdir for this job, by its process 0; the others wait for its answer.

    Yields:
      A function that raises ConfigError where somebody else has taken the lock meanwhile (this process was stopped for
      minutes, say): to be called before anything is written.

    Raises:
      HeldError: another process writes there: its host, pid and since when.
      ConfigError: the workdir cannot be written.
    """
    if jax.process_count() == 1:
        with _acquire_file(epath.Path(workdir) / FILE_NAME) as check:
            yield check
        return
    with contextlib.ExitStack() as stack:
        check, problem = _no_check, None
        if jax.process_index() == 0:
            try:
                check = stack.enter_context(_acquire_file(epath.Path(workdir) / FILE_NAME))
            except ConfigError as error:
                problem = error
        grade = 0 if problem is None else 1 if isinstance(problem, LockedError) else 2
        grade = int(multihost_utils.broadcast_one_to_all(np.array(grade)))
        if grade:
            kind = LockedError if grade == 1 else ConfigError
            raise problem or kind(f"--workdir={workdir} is not to be had: process 0 says why.")
        yield check


def holder(workdir: str) -> str | None:
    """Who holds the workdir, as far as can be told at once; None where nobody does, or a process of this machine that is gone."""
    with storage.wrap_errors(f"--workdir={workdir} cannot be read"):
        there, _ = _read_lock(epath.Path(workdir) / FILE_NAME)
    here = there is not None and there.get("machine") == _machine_id()
    return None if there is None or (here and not _process_exists(there)) else _describe_holder(there)


def _no_check() -> None:
    pass


@contextlib.contextmanager
def _acquire_file(path: epath.Path) -> Iterator[Callable[[], None]]:
    mine: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    mine |= {
        "machine": _machine_id(),
        "started": _process_start_time(os.getpid()),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }
    storage.check_arrays_path(path.parent, write=False)
    with storage.wrap_errors(f"--workdir={path.parent} cannot be written"):
        if not storage.is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        _write_lock(path, mine)
    left = threading.Event()

    def other(holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") != mine["token"]

    def beat() -> None:
        while not left.wait(HEARTBEAT_SECONDS):
            mine["beat"] += 1
            try:
                holder, version = _read_lock(path)
                if other(holder):
                    return
                storage.write_version(path, _encode(mine), version)
            except Exception as error:  # a full disk, a bucket away for a moment: the next one may do
                logging.warning("the lock %s cannot be renewed: %s", path, storage.cause_message(error))

    def check() -> None:
        with storage.wrap_errors(f"{path} cannot be read"):
            holder, _ = _read_lock(path)
        if holder is not None and other(holder):
            raise LockedError(
                f"{path.parent} was taken over by {_describe_holder(holder)} while this process stood still."
            )

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(Exception):  # what is left is recognised as stale
            holder, version = _read_lock(path)
            if not other(holder):
                storage.write_version(path, None, version)


def _write_lock(path: epath.Path, mine: dict[str, Any]) -> None:
    """Writes the lock in place of none or of a stale one.

    Raises:
      HeldError: Another process holds it. Of several that come at the same moment, one gets the lock.
    """
    while True:
        holder, version = _read_lock(path)
        if holder is not None and _is_alive(path, holder):
            raise LockedError(
                f"--workdir={path.parent} is written by {_describe_holder(holder)}: stop that one or give another --workdir "
                f"(nobody does? remove {path})."
            )
        if storage.write_version(path, _encode(mine), version):
            break
    if holder is not None:
        logging.warning("took the workdir over from %s, which is gone", _describe_holder(holder))


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _read_lock(path: epath.Path) -> tuple[dict[str, Any] | None, bytes]:
    """The lock, None if there is none and empty if it is damaged, and its version."""
    content, version = storage.retry(lambda: storage.read_version(path))
    if content is None:
        return None, version
    try:
        holder = json.loads(content)
    except ValueError:
        holder = {}
    return holder if isinstance(holder, dict) else {}, version


def _is_alive(path: epath.Path, there: dict[str, Any]) -> bool:
    if "token" not in there:  # damaged: who lives renews it
        return False
    if there.get("machine") == _machine_id():
        return _process_exists(there)
    logging.info(
        "%s may be written by %s: looking for a sign of life, %.0f s at most",
        path.parent,
        _describe_holder(there),
        STALE_SECONDS,
    )
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        now, _ = _read_lock(path)
        if now is None:  # it has finished
            return False
        if now != there:
            return True
    return False


def _process_exists(there: dict[str, Any]) -> bool:
    """Whether the process of a lock of this machine is there."""
    return there.get("started", "") == _process_start_time(there.get("pid", 0)) != ""


def _describe_holder(there: dict[str, Any]) -> str:
    return f"process {there.get('pid', '?')} on {there.get('host', '?')} since {there.get('since', '?')}"


def _machine_id() -> str:
    """Where process numbers mean the same: this boot of this machine, in this container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _process_start_time(pid: int) -> str:
    """When a process began, in ticks since the boot: numbers are used again. "" where there is none such."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        pass
    if os.path.exists("/proc/self/stat"):
        return ""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except PermissionError:
        pass
    return "alive"
