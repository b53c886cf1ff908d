"""launch/local.sh with a stand-in for main.py."""

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


def test_local_passes_sigterm_on(cloud: Cloud, program: str, tmp_path: Path) -> None:
    command = ["bash", str(LAUNCH / "local.sh"), "2", "--", f"--ready={tmp_path}/r"]
    environment = cloud.environment | {"MADFORMER_COMMAND": program}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (tmp_path / "r0").exists() and (tmp_path / "r1").exists())
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert {"[0] saved", "[1] saved"} <= set(output.splitlines())
