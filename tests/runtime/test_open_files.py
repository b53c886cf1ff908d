import os
import resource
import subprocess
import sys

import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import open_files

_READ = """
import pathlib, resource, sys
from madformer_jax.data import records
paths = [f"{sys.argv[1]}/{k}" for k in range(300)]
for k, path in enumerate(paths):
    writer = records.open_writer(path)
    writer.write(str(k).encode())
    writer.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
readers = records._ShardReaders(paths, "")
assert [int(x) for x in readers.read([*range(300)], [0] * 300)] == [*range(300)]
pathlib.Path(sys.argv[1], "more").touch()  # others can open files
"""


def test_more_shards_than_the_system_lets_a_process_open_are_read(tmp_path):
    """In a process of its own: one that may open no more files is ended by ArrayRecord."""
    done = subprocess.run([sys.executable, "-c", _READ, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert os.path.exists(tmp_path / "more")


@pytest.fixture
def limits(monkeypatch):
    """Soft and hard limit, as a system would have them."""
    values = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(values))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, given: values.__setitem__(slice(None), given))
    return values


def test_the_limit_is_raised_as_far_as_it_goes(limits):
    open_files.raise_limit()
    assert limits == [4096, 4096]
    limits[:] = 20, 40
    with pytest.raises(ConfigError, match="this process may hold 40 files open, and needs 64 at least: ulimit -n 1024"):
        open_files.raise_limit()


@pytest.mark.parametrize(("limit", "share"), [(64, 16), (256, 112), (1024, 400), (1 << 20, 400)])
def test_a_reader_leaves_files_to_others(limits, limit, share):
    limits[0] = limit
    assert open_files.reader_limit(400) == share
