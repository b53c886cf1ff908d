"""launch/host.sh with a stand-in for main.py."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, Cloud, wait_for


def test_host_runs_once_at_a_time_and_stop_lets_it_save(cloud: Cloud, program: str, tmp_path: Path) -> None:
    def host(*arguments: str) -> subprocess.CompletedProcess[str]:
        return cloud.run("host.sh", *arguments, MADFORMER_COMMAND=program)

    ready = tmp_path / "ready"
    log = tmp_path / "home/.madformer/log"
    assert host("status").stdout.endswith(" idle\n")
    assert host("start", "--", f"--ready={ready}", "--text=a b").stdout.endswith(" running\n")
    wait_for(ready.exists)
    assert host("status").stdout.endswith(" running\n")
    second = host("start", "--", f"--ready={ready}")
    assert second.returncode == 1
    assert "already" in second.stderr
    assert host("stop").stdout.endswith(" interrupted\n"), "a run that was saved and stopped is not done"
    assert log.read_text().count("arguments") == 1
    assert "--text=a b" in log.read_text()
    assert log.read_text().endswith("saved\n")


@pytest.mark.parametrize(("code", "word"), [("0", "done"), ("3", "failed 3"), ("143", "interrupted")])
def test_host_reports_how_the_run_ended(cloud: Cloud, program: str, tmp_path: Path, code: str, word: str) -> None:
    """To whoever asks, or asks for the same arguments; a run with others has not begun."""
    arguments = (f"--ready={tmp_path}/r", f"--exit={code}", "--text=a b")
    cloud.run("host.sh", "start", "--", *arguments, MADFORMER_COMMAND=program)
    wait_for(lambda: not cloud.run("host.sh", "status").stdout.endswith(" running\n"))
    assert cloud.run("host.sh", "status").stdout.endswith(f" {word}\n")
    assert cloud.run("host.sh", "status", "--", *arguments).stdout.endswith(f" {word}\n")
    assert cloud.run("host.sh", "status", "--", *arguments[:-1]).stdout.endswith(" idle\n")


def test_host_calls_a_run_that_vanished_interrupted(cloud: Cloud, program: str, tmp_path: Path) -> None:
    cloud.run("host.sh", "start", "--", f"--ready={tmp_path}/r", MADFORMER_COMMAND=program)
    wait_for((tmp_path / "r").exists)
    pid = int((tmp_path / "home/.madformer/pid").read_text())
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: cloud.run("host.sh", "status").stdout.endswith(" interrupted\n"))


def test_host_kills_a_run_that_does_not_hear(cloud: Cloud, program: str, tmp_path: Path) -> None:
    cloud.run("host.sh", "start", "--", f"--ready={tmp_path}/r", "--deaf=1", MADFORMER_COMMAND=program)
    wait_for((tmp_path / "r").exists)
    time.sleep(0.3)
    stopped = cloud.run("host.sh", "stop", MADFORMER_COMMAND=program, MADFORMER_GRACE="1")
    assert stopped.stdout.endswith(" interrupted\n")


def test_host_run_in_the_foreground_returns_143_when_told_to_stop(cloud: Cloud, program: str, tmp_path: Path) -> None:
    command = ["bash", str(LAUNCH / "host.sh"), "run", "--", f"--ready={tmp_path}/r"]
    with subprocess.Popen(command, env=cloud.environment | {"MADFORMER_COMMAND": program}) as process:
        wait_for((tmp_path / "r").exists)
        process.terminate()
        assert process.wait(20) == 143
    assert (
        cloud.run("host.sh", "run", "--", f"--ready={tmp_path}/r", "--exit=5", MADFORMER_COMMAND=program).returncode
        == 5
    )
