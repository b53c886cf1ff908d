"""Lock of a folder, so that one job writes to it: the file `lock.json`, which its holder renews.

Training, runs of a sweep, `--mode=prepare`, `--mode=export` and the evaluation of shards hold it.
On the machine of its holder a lock is stale when the process has ended. Elsewhere (another machine,
a container, a bucket) it is stale when it does not change for `STALE_SECONDS`; clocks are not
compared.
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
HEARTBEAT_SECONDS = 15.0  # between two renewals
STALE_SECONDS = 90.0  # without a renewal, after which a process elsewhere counts as dead


class LockedError(ConfigError):
    """Another process holds the workdir."""


_OUTCOMES = (None, LockedError, ConfigError)  # of process 0, which sends the index to the other processes


@contextlib.contextmanager
def acquire(workdir: str) -> Iterator[Callable[[], None]]:
    """Holds the lock of a workdir for this job. Process 0 takes the lock, and the others wait for it.

    Yields:
      A function to call before each write. It raises LockedError if another process has taken over the
      lock meanwhile, for example because this process was suspended for minutes.

    Raises:
      LockedError: Another process holds the lock. The message has its host, process id and start.
      ConfigError: The workdir cannot be written.
    """
    if jax.process_count() == 1:
        with _acquire_file(epath.Path(workdir) / FILE_NAME) as check:
            yield check
        return
    with contextlib.ExitStack() as stack:
        check, failure = (lambda: None), None
        if jax.process_index() == 0:
            try:
                check = stack.enter_context(_acquire_file(epath.Path(workdir) / FILE_NAME))
            except ConfigError as error:
                failure = error
        outcome = 0 if failure is None else 1 if isinstance(failure, LockedError) else 2
        error_type = _OUTCOMES[int(multihost_utils.broadcast_one_to_all(np.array(outcome)))]
        if error_type is not None:
            raise failure or error_type(f"--workdir={workdir} cannot be locked: see the message of process 0.")
        yield check


def holder(workdir: str) -> str | None:
    """Returns a description of the holder of the workdir.

    Returns None if nobody holds it, or if its holder was on this machine and has ended.
    """
    with storage.wrap_errors(f"--workdir={workdir} cannot be read"):
        owner, _ = _read_lock(epath.Path(workdir) / FILE_NAME)
    if owner is None or (owner.get("machine") == _machine_id() and not _process_exists(owner)):
        return None
    return _describe_holder(owner)


@contextlib.contextmanager
def _acquire_file(path: epath.Path) -> Iterator[Callable[[], None]]:
    pid = os.getpid()
    mine: dict[str, Any] = {
        "host": socket.gethostname(), "pid": pid, "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": _machine_id(), "started": _process_start_time(pid), "token": uuid.uuid4().hex, "beat": 0,
    }  # fmt: skip
    storage.check_arrays_path(path.parent, write=False)
    with storage.wrap_errors(f"--workdir={path.parent} cannot be written"):
        if not storage.is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        _write_lock(path, mine)
    released = threading.Event()

    def is_taken_over(holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") != mine["token"]

    def beat() -> None:
        while not released.wait(HEARTBEAT_SECONDS):
            mine["beat"] += 1
            try:
                holder, version = _read_lock(path)
                if is_taken_over(holder):
                    return
                storage.write_version(path, _encode(mine), version)
            except Exception as error:  # the next renewal may succeed
                logging.warning("the lock %s cannot be renewed: %s", path, storage.cause_message(error))

    def check() -> None:
        with storage.wrap_errors(f"{path} cannot be read"):
            holder, _ = _read_lock(path)
        if holder is not None and is_taken_over(holder):
            raise LockedError(
                f"{path.parent} was taken over by {_describe_holder(holder)} while this process was suspended or could "
                "not renew its lock."
            )

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        released.set()
        thread.join()
        with contextlib.suppress(Exception):  # a file that remains is recognized as stale
            holder, version = _read_lock(path)
            if not is_taken_over(holder):
                storage.write_version(path, None, version)


def _write_lock(path: epath.Path, mine: dict[str, Any]) -> None:
    """Writes the lock, or replaces a stale one. Only one of several simultaneous processes succeeds."""
    while True:
        holder, version = _read_lock(path)
        if holder is not None and _is_alive(path, holder):
            raise LockedError(
                f"--workdir={path.parent} is written by {_describe_holder(holder)}: stop that one or give another --workdir. "
                f"If that process no longer exists, remove {path}."
            )
        if storage.write_version(path, _encode(mine), version):
            break
    if holder is not None:
        logging.warning("took the workdir over from %s, which is gone", _describe_holder(holder))


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _read_lock(path: epath.Path) -> tuple[dict[str, Any] | None, bytes]:
    """Returns the content of the lock and its version.

    The content is None if the file does not exist, and empty if the file is damaged.
    """
    content, version = storage.retry(lambda: storage.read_version(path))
    if content is None:
        return None, version
    try:
        holder = json.loads(content)
    except ValueError:
        holder = {}
    return holder if isinstance(holder, dict) else {}, version


def _is_alive(path: epath.Path, holder: dict[str, Any]) -> bool:
    if "token" not in holder:  # damaged: a live holder would renew it
        return False
    if holder.get("machine") == _machine_id():
        return _process_exists(holder)
    logging.info(
        "%s may be written by %s: looking for a sign of life, %.0f s at most",
        path.parent, _describe_holder(holder), STALE_SECONDS,
    )  # fmt: skip
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        now, _ = _read_lock(path)
        if now is None:  # the holder has finished
            return False
        if now != holder:
            return True
    return False


def _process_exists(holder: dict[str, Any]) -> bool:
    """Returns whether the holder of a lock of this machine still runs."""
    return holder.get("started", "") == _process_start_time(holder.get("pid", 0)) != ""


def _describe_holder(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"


def _machine_id() -> str:
    """Returns an id of the namespace of process ids: machine, boot and container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _process_start_time(pid: int) -> str:
    """Returns the start of a process in ticks since the boot, because ids are reused; "" if it does not run."""
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
