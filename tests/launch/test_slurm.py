"""launch/slurm.sh and slurm.sbatch against stand-ins for Slurm."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, MAIN, Cloud, wait_for


@pytest.mark.parametrize(("mode", "tasks", "devices"), [((), "4", ""), (("--per-node",), "1", "0,1,2,3")])
def test_slurm_submits_a_task_per_gpu_or_per_node(
    cloud: Cloud, tmp_path: Path, mode: tuple[str, ...], tasks: str, devices: str
) -> None:
    cloud.command("sbatch", f'#!/bin/sh\nprintf "%s\\n" "$MADFORMER_DEVICES" "$@" >{tmp_path}/submitted\n')
    cloud.run("slurm.sh", "--nodes=2", "--gpus=4", *mode, "--", *MAIN)
    seen, *arguments = (tmp_path / "submitted").read_text().splitlines()
    assert seen == devices
    at = arguments.index(str(LAUNCH / "slurm.sbatch"))
    assert {"--nodes=2", "--gpus-per-node=4", f"--ntasks-per-node={tasks}"} <= set(arguments[:at])
    assert tuple(arguments[at + 1 :]) == MAIN


def test_slurm_array_shares_a_sweep(cloud: Cloud) -> None:
    run = cloud.run("slurm.sh", "--nodes=1", "--gpus=1", "--array=8", "--", *MAIN, "--mode=sweep")
    assert run.returncode == 0, run.stderr
    (call,) = cloud.calls
    assert {"--array=0-7", "--output=%x-%A_%a.log"} <= set(call)
    assert not any("%j" in argument for argument in call)


def test_slurm_job_of_an_array_knows_its_number(cloud: Cloud, tmp_path: Path) -> None:
    cloud.command("srun", f'#!/bin/sh\necho "$MADFORMER_INDEX" >{tmp_path}/index\n')
    assert cloud.run("slurm.sbatch", *MAIN, SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="3").returncode == 0
    assert (tmp_path / "index").read_text() == "3\n"


def test_slurm_directives_ask_for_a_warning_and_a_requeue() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --signal=B:USR1@120" in text
    assert "#SBATCH --open-mode=append" in text


def test_slurm_job_runs_main_on_all_tasks_and_returns_its_status(cloud: Cloud) -> None:
    cloud.answers({"srun": ["ERROR task failed"]})
    job = cloud.run("slurm.sbatch", *MAIN, SLURM_JOB_ID="7", MADFORMER_DEVICES="0,1", MADFORMER_COMMAND="python main")
    assert job.returncode == 1
    (call,) = cloud.calls
    assert call[0] == "srun"
    assert "--kill-on-bad-exit=1" in call
    assert call[call.index("python") :] == ["python", "main", *MAIN, "--distributed"]


def test_slurm_job_near_its_time_limit_saves_and_queues_again(cloud: Cloud, program: str, tmp_path: Path) -> None:
    # srun runs the program as one task; scancel sends SIGTERM to the task, as Slurm does.
    cloud.command("srun", f'#!/bin/sh\necho "$$" >{tmp_path}/task\nshift 2\nexec "$@"\n')
    cloud.command("scancel", f'#!/bin/sh\necho "$@" >{tmp_path}/cancelled\nkill -TERM "$(cat {tmp_path}/task)"\n')
    environment = cloud.environment | {"SLURM_JOB_ID": "7", "MADFORMER_COMMAND": program}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), f"--ready={tmp_path}/r"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        wait_for((tmp_path / "r").exists)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=20)
    assert "saved" in output
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7\n"
    assert cloud.calls == [["scontrol", "requeue", "7"]]


def test_slurm_job_waits_for_its_tasks_after_sigterm(cloud: Cloud, program: str, tmp_path: Path) -> None:
    cloud.command("srun", f'#!/bin/sh\necho "$$" >{tmp_path}/task\nshift 2\nexec "$@"\n')
    environment = cloud.environment | {"SLURM_JOB_ID": "7", "MADFORMER_COMMAND": program}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), f"--ready={tmp_path}/r"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        wait_for((tmp_path / "r").exists)
        job.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(0.3)
        os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
        output, _ = job.communicate(timeout=20)
    assert (job.returncode, "saved" in output) == (0, True)
    assert cloud.calls == []


def test_slurm_job_that_ends_by_itself_is_not_queued_again(cloud: Cloud) -> None:
    assert cloud.run("slurm.sbatch", *MAIN, SLURM_JOB_ID="7").returncode == 0
    assert [c[0] for c in cloud.calls] == ["srun"]
