"""Properties of all launch scripts."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, MAIN, SCRIPTS, TPU, Cloud


def test_shellcheck_is_clean() -> None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(str(p) for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
    check = subprocess.run(
        [shellcheck, "--external-sources", f"--source-path={LAUNCH.parent}", *files], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_usage(cloud: Cloud, script: str) -> None:
    shown = cloud.run(script, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: launch/{script} ")


@pytest.mark.parametrize(
    ("script", "arguments", "wanted"),
    [
        ("tpu.sh", ["create", "--project=p", "--zone=z", "--type=v5p-8"], "--name"),
        ("tpu.sh", ["create", "--name=n", "--zone=z", "--type=v5p-8"], "--project"),
        ("tpu.sh", ["delete", "--name=n", "--project=p"], "--zone"),
        ("tpu.sh", ["create", *TPU], "--type"),
        ("tpu.sh", ["create", *TPU, "--type=v9-8"], "--runtime"),
        ("tpu.sh", ["run", *TPU], "no arguments for main.py"),
        ("tpu.sh", ["run", *TPU, "--", "--config=c", "--workdir=runs/x"], "gs://"),
        ("tpu.sh", ["run", *TPU, "--config=c"], "unknown setting"),
        ("tpu.sh", ["destroy"], "unknown verb"),
        ("tpu.sh", ["create", *TPU, "--type=v5p-8", "--poll=1m"], "--poll=1m is not a number of seconds"),
        ("local.sh", ["2", "--grace=60s", "--", "--config=c"], "--grace=60s is not a number of seconds"),
        ("local.sh", ["2", "--port=", "--", "--config=c"], "--port= is not a port"),
        ("gke_xpk.sh", ["create", "--project=p", "--zone=z", "--type=v5p-8"], "--cluster"),
        ("gke_xpk.sh", ["stop", "--cluster=c", "--project=p", "--zone=z"], "--name"),
        ("gke_xpk.sh", ["run", "--cluster=c", "--project=p", "--zone=z", "--type=t", "--name=n", "--", "--a"], "gs://"),
        (
            "gke_xpk.sh",
            ["run", "--cluster=c", "--project=p", "--zone=z", "--type=t", "--name=n", "--array=2", "--", *MAIN],
            "--mode=sweep",
        ),
        ("slurm.sh", ["--gpus=8", "--", "--config=c"], "--nodes"),
        ("slurm.sh", ["--nodes=1", "--gpus=1", "--array=2", "--", "--config=c"], "--mode=sweep"),
        ("slurm.sh", ["--nodes=1", "--gpus=1", "--array=0-7", "--", "--mode=sweep"], "--array=0-7 is not a number"),
        ("slurm.sh", ["--nodes=2", "--", "--config=c"], "--gpus"),
        ("slurm.sh", ["--nodes=2", "--gpus=8"], "no arguments for main.py"),
        ("slurm.sbatch", ["--config=c"], "not in a Slurm job"),
        ("local.sh", ["--", "--config=c"], "no number of processes"),
        ("local.sh", ["2x", "--", "--config=c"], "no number of processes"),
        ("local.sh", ["2"], "no arguments for main.py"),
        ("host.sh", ["begin"], "unknown verb"),
    ],
)
def test_a_missing_setting_is_one_line_and_status_2(
    cloud: Cloud, script: str, arguments: list[str], wanted: str
) -> None:
    refused = cloud.run(script, *arguments)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert wanted in refused.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("script", "arguments", "printed"),
    [
        ("tpu.sh", ["create", *TPU, "--type=v5p-8"], "queued-resources create run1"),
        ("tpu.sh", ["install", *TPU], "tpu-vm scp"),
        ("tpu.sh", ["run", *TPU, "--", *MAIN], "host.sh start"),
        ("tpu.sh", ["status", *TPU], "host.sh status"),
        ("tpu.sh", ["logs", *TPU], "tail"),
        ("tpu.sh", ["stop", *TPU], "host.sh stop"),
        ("tpu.sh", ["resume", *TPU, "--type=v5p-8", "--", *MAIN], "host.sh start"),
        ("tpu.sh", ["delete", *TPU], "queued-resources delete run1"),
        ("gke_xpk.sh", ["create", "--cluster=c", "--project=p", "--zone=z", "--type=v5p-8"], "xpk cluster create"),
        (
            "gke_xpk.sh",
            ["run", "--cluster=c", "--project=p", "--zone=z", "--type=v5p-8", "--name=w", "--", *MAIN],
            "xpk workload create",
        ),
        ("slurm.sh", ["--nodes=2", "--gpus=8", "--", *MAIN], "sbatch "),
        ("local.sh", ["3", "--", *MAIN], "--process_id=2"),
    ],
)
def test_dry_run_prints_and_calls_nothing(cloud: Cloud, script: str, arguments: list[str], printed: str) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    shown = cloud.run(script, *arguments[:at], "--dry-run", *arguments[at:])
    assert shown.returncode == 0, shown.stderr
    assert printed in shown.stdout
    assert cloud.calls == []
    for line in shown.stdout.splitlines():
        assert shutil.which(shlex.split(line)[0], path=cloud.environment["PATH"]), f"not a command: {line}"
