import errno
import json
import os
import subprocess
import sys
import unittest.mock

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage
from tests import paths
from tests.support import bucket as bucket_of_tests


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    storage.write_text(path, "old")

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(ConfigError, match="^file cannot be written: No space left on device.$"),
        storage.wrap_errors("file cannot be written"),
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


def test_transient_errors_are_tried_again():
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
    with pytest.raises(ZeroDivisionError), storage.wrap_errors("x"):
        _ = 1 / 0


@pytest.mark.parametrize("name", paths.NAMES)
def test_the_name_of_a_folder_is_no_pattern(tmp_path, name):
    for folder in (name, "a1", "xy"):
        storage.write_text(tmp_path / folder / "part_2.json", folder)
    storage.write_text(tmp_path / name / "part_1.json", name)
    storage.write_text(tmp_path / name / "other.json", name)
    found = storage.list_matching(tmp_path / name, "part_*.json")
    assert [(path.name, path.read_text()) for path in found] == [("part_1.json", name), ("part_2.json", name)]
    assert storage.list_matching(tmp_path / name / "none", "*") == []


def test_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    expanded = {
        "~": "/home/one",
        "~/runs": "/home/one/runs",
        "./~": "./~",
        "a/~": "a/~",
        "gs://a/~": "gs://a/~",
        "": "",
    }
    assert {path: storage.expand(path) for path in expanded} == expanded
    assert storage.user_cache("xla") == "/home/one/cache/madformer_jax/xla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.user_cache("xla") == "/home/one/.cache/madformer_jax/xla"


def test_a_bucket_needs_a_package_that_opens_it(monkeypatch):
    installed: set[str] = set()
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert storage.expand("gs:/local") == "gs:/local"
    with pytest.raises(ConfigError, match=r"^s3://a/b is in a bucket. .*: pip install -e '\.\[cloud\]'\.$"):
        storage.expand("s3://a/b")
    installed.add("tensorflow")
    assert storage.expand("s3://a/b") == "s3://a/b"


def test_without_a_home_folder_no_folder_named_tilde_is_made(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path
    )  # as with a user number that has no entry, and no HOME
    with pytest.raises(ConfigError, match="the home folder is unknown. Set the environment variable HOME"):
        storage.user_cache("xla")


@pytest.mark.parametrize("scheme", ["az://bucket/run", "hf://owner/run"])
def test_a_bucket_that_holds_no_checkpoints_is_refused(scheme):
    with pytest.raises(ConfigError, match="its address, which must be gs://BUCKET"):
        storage.check_arrays_path(scheme, write=True)


def test_an_address_in_a_bucket_is_quoted():
    assert storage.kvstore("gs://bucket/a b/%41#") == "gs://bucket/a%20b/%2541%23/"
    storage.check_arrays_path("gs://bucket/a b/\u0645\u200c", write=True)
    storage.check_arrays_path("gs://bucket/a#b", write=False)
    for name in ("a#b", "a%41b", "a?b", "a*", "a[1]", "a\\b"):
        with pytest.raises(ConfigError, match="does not support '.*' in its path. Rename the folder"):
            storage.check_arrays_path(f"gs://bucket/{name}/run", write=True)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A local folder that is taken for a bucket: what is open for writing is published when it is closed."""
    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    return tmp_path


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), MemoryError()])
def test_an_object_in_a_bucket_appears_whole_or_not_at_all(bucket, monkeypatch, error):
    storage.write_text(bucket / "file", "old")

    def fail(content, target, length):
        target.write(content.read(2))
        raise error

    monkeypatch.setattr(storage.shutil, "copyfileobj", fail)
    with pytest.raises(type(error)):
        storage.write_text(bucket / "file", "new content")
    assert {path.name: path.read_text() for path in bucket.iterdir()} == {"file": "old"}


def test_an_object_of_another_size_is_not_published(bucket, monkeypatch):
    storage.write_text(bucket / "file", "old")
    monkeypatch.setattr(storage.shutil, "copyfileobj", lambda content, target, length: target.write(content.read(2)))
    with pytest.raises(OSError, match="2 of 3 bytes arrived"):
        storage.write_text(bucket / "file", "new")
    assert {path.name: path.read_text() for path in bucket.iterdir()} == {"file": "old"}


def test_a_file_is_written_by_the_first_who_has_seen_its_version(tmp_path):
    path = tmp_path / "lock.json"
    content, missing = storage.read_version(path)
    assert content is None and storage.write_version(path, b"one", missing)
    assert not storage.write_version(path, b"two", missing)
    content, version = storage.read_version(path)
    assert content == b"one" and storage.write_version(path, b"two", version)
    assert not storage.write_version(path, None, version)
    assert storage.write_version(path, None, storage.read_version(path)[1])
    assert not list(tmp_path.iterdir())


def test_in_a_bucket_one_of_two_writers_is_first():
    code = """
from madformer_jax.runtime import storage
path = "gs://bucket/a b#/lock.json"
content, missing = storage.read_version(path)
assert content is None and storage.write_version(path, b"one", missing)
assert not storage.write_version(path, b"two", missing)
content, version = storage.read_version(path)
assert content == b"one" and storage.write_version(path, b"three", version)
assert not storage.write_version(path, b"four", version)
storage.write_bytes("gs://bucket/empty", b"")
"""
    with bucket_of_tests.serve() as (store, environment):
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True, timeout=60)
        assert store.objects == {"a b#/lock.json": b"three", "empty": b""}
