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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda x: str(int(x)))
def test_host_run_in_the_foreground_waits_for_the_save_and_returns_143(
    cloud: Cloud, program: str, tmp_path: Path, number: signal.Signals
) -> None:
    command = ["bash", str(LAUNCH / "host.sh"), "run", "--", f"--ready={tmp_path}/r", "--slow=0.3"]
    environment = cloud.environment | {"MADFORMER_COMMAND": program}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "r").exists)
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 143
        assert "saved" in output.splitlines()


def test_host_passes_the_exit_status_of_main_on(cloud: Cloud, program: str, tmp_path: Path) -> None:
    assert (
        cloud.run("host.sh", "run", "--", f"--ready={tmp_path}/r", "--exit=5", MADFORMER_COMMAND=program).returncode
        == 5
    )


def test_host_container_can_be_stopped_while_it_installs(cloud: Cloud, program: str, tmp_path: Path) -> None:
    cloud.command("python3", f"#!/bin/sh\ntouch {tmp_path}/installing\nexec /bin/sleep 60\n")
    command = ["bash", str(LAUNCH / "host.sh"), "container", "--", f"--ready={tmp_path}/r"]
    environment = cloud.environment | {"MADFORMER_COMMAND": program}
    with subprocess.Popen(command, env=environment) as process:
        wait_for((tmp_path / "installing").exists)
        process.terminate()
        assert process.wait(20) == 143
    assert not (tmp_path / "r").exists()
