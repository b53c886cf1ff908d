import contextlib
import json
import os
import subprocess
import threading
import time

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import lock, storage


def test_one_writer_a_workdir(tmp_path):
    taken = pytest.raises(ConfigError, match=f"is written by process {os.getpid()} on .* since 20")
    with lock.acquire(str(tmp_path)) as check:
        check()
        with taken as error, lock.acquire(str(tmp_path)):
            pass
        assert "\n" not in str(error.value)
    with lock.acquire(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def left(tmp_path):
    """The lock of a process that is gone, to be changed and written."""
    with lock.acquire(str(tmp_path)):
        content = json.loads((tmp_path / lock.FILE_NAME).read_text())
    process = subprocess.Popen(["true"])
    process.wait()
    content |= {"pid": process.pid, "token": "other"}

    def write(**changes):
        (tmp_path / lock.FILE_NAME).write_text(json.dumps(content | changes))

    return write


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, left, caplog):
    for changes in ({}, {"pid": os.getpid(), "started": "1"}):  # its number may live on in another process
        left(**changes)
        with lock.acquire(str(tmp_path)) as check:
            check()
        assert "took the workdir over from process" in caplog.text
    (tmp_path / lock.FILE_NAME).write_text("{half")
    with lock.acquire(str(tmp_path)):
        pass


def test_from_elsewhere_a_lock_that_does_not_change_is_stale(tmp_path, left, monkeypatch, caplog):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.1)
    left(machine="another")
    with lock.acquire(str(tmp_path)):
        pass
    assert "took the workdir over" in caplog.text


def test_from_elsewhere_a_lock_that_changes_is_held(tmp_path, left, monkeypatch):
    left(machine="another")
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: left(machine="another", beat=1))  # while we watch
    with pytest.raises(ConfigError, match="is written by process"), lock.acquire(str(tmp_path)):
        pass


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    alive = threading.Event()

    def write(path, content, version, real=storage.write_version):
        written = real(path, content, version)
        if content and json.loads(content)["beat"] >= 2:
            alive.set()
        return written

    monkeypatch.setattr(storage, "write_version", write)
    with lock.acquire(str(tmp_path)):
        assert alive.wait(20)


def test_a_holder_notices_a_take_over(tmp_path, left):
    with lock.acquire(str(tmp_path)) as check:
        left()
        with pytest.raises(ConfigError, match="was taken over by process"):
            check()
    assert json.loads((tmp_path / lock.FILE_NAME).read_text())["token"] == "other"  # not ours to remove


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_come_at_the_same_moment_one_gets_the_lock(tmp_path, left, monkeypatch, stale):
    count, held, refused = 8, [], []
    barrier, local = threading.Barrier(count), threading.local()

    def read(path, real=lock._read_lock):
        found = real(path)
        if not hasattr(local, "seen"):  # all see the workdir free, and write one after the other
            local.seen = barrier.wait()
            time.sleep(0.02 * local.seen)
        return found

    def come():
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock.acquire(str(tmp_path)))
                held.append(stack)
            except lock.LockedError as error:
                refused.append(str(error))
            barrier.wait()  # until then it is held

    if stale:
        left()
    monkeypatch.setattr(lock, "_read_lock", read)
    threads = [threading.Thread(target=come) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == count - 1


def test_a_folder_that_cannot_be_locked_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in (("file/run", "cannot be written"), ("a\\b", "files cannot be addressed here")):
        with pytest.raises(ConfigError, match=message) as error, lock.acquire(str(tmp_path / name)):
            pass
        assert "\n" not in str(error.value)
