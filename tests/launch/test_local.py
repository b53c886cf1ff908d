"""launch/local.sh with a stand-in for main.py."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, Cloud, wait_for


def test_local_starts_n_processes_that_know_each_other(cloud: Cloud) -> None:
    ran = cloud.run("local.sh", "3", "--port=5000", "--", "--config=c", MADFORMER_COMMAND="echo")
    assert ran.returncode == 0, ran.stderr
    lines = sorted(ran.stdout.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    for i, line in enumerate(lines):
        assert line.endswith(f"--coordinator=127.0.0.1:5000 --num_processes=3 --process_id={i}")


def test_local_runs_on_the_cpu_unless_told_otherwise(cloud: Cloud, program: str, tmp_path: Path) -> None:
    arguments = ("local.sh", "1", "--", f"--ready={tmp_path}/r", "--exit=0", "--text=a b")
    kept = {"MADFORMER_COMMAND": program}
    on_cpu = cloud.run(*arguments, **kept, JAX_PLATFORMS="").stdout
    assert "--text=a b" in on_cpu
    assert " on cpu" in on_cpu
    assert " on cuda" in cloud.run(*arguments, **kept, JAX_PLATFORMS="cuda").stdout


@pytest.mark.parametrize("deaf", [(), ("--deaf=1",)])
def test_local_stops_the_others_when_one_fails(
    cloud: Cloud, program: str, tmp_path: Path, deaf: tuple[str, ...]
) -> None:
    started = time.monotonic()
    ran = cloud.run(
        "local.sh",
        "3",
        "--grace=2",
        "--",
        f"--ready={tmp_path}/r",
        "--exit=7",
        "--only=1",
        *deaf,
        MADFORMER_COMMAND=program,
    )
    assert ran.returncode == 7
    assert "process 1 failed with exit status 7" in ran.stderr
    assert time.monotonic() - started < 20, "the others would have run for a minute"


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=lambda x: str(int(x))
)
def test_local_passes_signals_on_and_waits_until_all_have_saved(
    cloud: Cloud, program: str, tmp_path: Path, number: signal.Signals, status: int, group: bool
) -> None:
    """Signals to the script alone, and to the process group, as Ctrl-C and a closed terminal send them."""
    command = ["bash", str(LAUNCH / "local.sh"), "2", "--", f"--ready={tmp_path}/r", "--slow=0.5"]
    environment = cloud.environment | {"MADFORMER_COMMAND": program}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: (tmp_path / "r0").exists() and (tmp_path / "r1").exists())
        os.killpg(process.pid, number) if group else process.send_signal(number)
        assert process.wait(20) == status
        assert (tmp_path / "r0.saved").exists() and (tmp_path / "r1.saved").exists()
        assert process.stdout is not None
        # Reads until the last process has closed it.
        assert {"[0] saved", "[1] saved"} <= set(process.stdout.read().splitlines())


def test_local_outlives_the_end_of_its_own_sleep(cloud: Cloud, program: str, tmp_path: Path) -> None:
    cloud.command("sleep", f"#!/bin/sh\ntouch {tmp_path}/slept\n/bin/sleep 0.01\nexit 130\n")
    ran = cloud.run("local.sh", "1", "--", f"--ready={tmp_path}/r", "--exit=0", MADFORMER_COMMAND=program)
    assert (tmp_path / "slept").exists()
    assert ran.returncode == 0
