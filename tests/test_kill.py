import os
import pathlib
import subprocess
import sys

from tests import QUICK

ROOT = pathlib.Path(__file__).parent.parent


def test_killed_runs_end_as_undisturbed_ones_do(tmp_path):
    """Two runs killed with SIGKILL, in a save and in a grid, one of which then hears SIGTERM; in a process that may fork."""
    command = [sys.executable, "-m", "tests.kill", "--runs=2", "--terms=1", "--samples=0", f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": QUICK}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 signals (" in done.stdout
    assert "all bit-identical" in done.stdout
