import json
import os
import subprocess
import threading

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import lock, storage


def test_one_writer_a_workdir(tmp_path):
    taken = pytest.raises(ConfigError, match=f"is written by process {os.getpid()} on .* since 20")
    with lock.hold(str(tmp_path)) as check:
        check()
        with taken as error, lock.hold(str(tmp_path)):
            pass
        assert "\n" not in str(error.value)
    with lock.hold(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def left(tmp_path):
    """The lock of a process that is gone, to be changed and written."""
    with lock.hold(str(tmp_path)):
        content = json.loads((tmp_path / lock.NAME).read_text())
    process = subprocess.Popen(["true"])
    process.wait()
    content |= {"pid": process.pid, "token": "other"}

    def write(**changes):
        (tmp_path / lock.NAME).write_text(json.dumps(content | changes))

    return write


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, left, caplog):
    for changes in ({}, {"pid": os.getpid(), "started": "1"}):  # its number may live on in another process
        left(**changes)
        with lock.hold(str(tmp_path)) as check:
            check()
        assert "took the workdir over from process" in caplog.text
    (tmp_path / lock.NAME).write_text("{half")
    with lock.hold(str(tmp_path)):
        pass


def test_from_elsewhere_a_lock_that_does_not_change_is_stale(tmp_path, left, monkeypatch, caplog):
    monkeypatch.setattr(lock, "STALE", 0.1)
    left(machine="another")
    with lock.hold(str(tmp_path)):
        pass
    assert "took the workdir over" in caplog.text


def test_from_elsewhere_a_lock_that_changes_is_held(tmp_path, left, monkeypatch):
    left(machine="another")
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: left(machine="another", beat=1))  # while we watch
    with pytest.raises(ConfigError, match="is written by process"), lock.hold(str(tmp_path)):
        pass


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    alive = threading.Event()

    def write(path, content, real=storage.write_json):
        real(path, content)
        if json.loads((tmp_path / lock.NAME).read_text())["beat"] >= 2:
            alive.set()

    monkeypatch.setattr(storage, "write_json", write)
    with lock.hold(str(tmp_path)):
        assert alive.wait(20)


def test_a_holder_notices_a_take_over(tmp_path, left):
    with lock.hold(str(tmp_path)) as check:
        left()
        with pytest.raises(ConfigError, match="was taken over by process"):
            check()
    assert json.loads((tmp_path / lock.NAME).read_text())["token"] == "other"  # not ours to remove
