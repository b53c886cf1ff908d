import errno
import json
import unittest.mock

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    storage.write_text(path, "old")

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(ConfigError, match="^file cannot be written: No space left on device.$"),
        storage.errors("file cannot be written"),
    ):
        storage.write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_writer_may_seek(tmp_path):
    def put(file):
        file.write(b"xbc")
        file.seek(0)
        file.write(b"a")

    storage.write(tmp_path / "file", put)
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_lines_are_added_after_half_a_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    storage.append_line(path, "one")
    with path.open("a") as file:
        file.write("ha")
    storage.append_line(path, "two")
    assert path.read_text().splitlines() == ["one", "ha", "two"]


def test_a_broken_json_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    assert storage.read_json(path) is None
    storage.write_json(path, {"a": 1})
    assert storage.read_json(path) == json.loads(path.read_text()) == {"a": 1}
    for content in (b'{"a": ', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="config.json is damaged"):
            storage.read_json(path)


def test_what_may_pass_is_tried_again():
    failing = unittest.mock.Mock(side_effect=[OSError(errno.EIO, "Input/output error"), TimeoutError(), "content"])
    assert storage.retry(failing, waits=(0, 0, 0)) == "content"
    for error in (
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError("/runs/503"),
        ValueError("500"),
    ):
        fail = unittest.mock.Mock(side_effect=error)
        with pytest.raises(type(error)):
            storage.retry(fail, waits=(0, 0))
        fail.assert_called_once()


def test_only_storage_errors_become_a_line():
    with pytest.raises(ZeroDivisionError), storage.errors("x"):
        _ = 1 / 0
