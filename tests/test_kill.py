import os
import pathlib
import subprocess
import sys

import pytest

from tests import QUICK

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one_does(tmp_path):
    """A run gets SIGKILL in a save, goes on, gets SIGTERM in a grid, and goes on again; in a process that may fork."""
    command = [sys.executable, "-m", "tests.kill", "--runs=1", "--terms=1", "--samples=0", f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": QUICK}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 signals (" in done.stdout
    assert "all bit-identical" in done.stdout
