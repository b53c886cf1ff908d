"""The launch scripts against stand-ins for gcloud, xpk, kubectl, sbatch, srun and scancel that record their calls.

Over 400 lines: the four launchers share the stand-ins and are held against the same promises.
"""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("tpu.sh", "gke_xpk.sh", "slurm.sh", "local.sh", "host.sh")
TPU = ("--name=run1", "--project=proj", "--zone=us-west4-a")
MAIN = ("--config=configs/ffhq1024.py:D=7", "--workdir=gs://bucket/run 1", "--config.note=it's")

# Appends its name and arguments to calls.jsonl; prints the next line of its script of answers, the last one for ever.
# An answer "ERROR text" goes to stderr with exit status 1.
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
folder = Path({folder!r})
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
for key, answers in json.loads((folder / "answers.json").read_text()).items():
    if key in " ".join([name, *arguments]):
        count = folder / ("count " + key.replace("/", " "))
        i = int(count.read_text()) if count.exists() else 0
        count.write_text(str(i + 1))
        answer = answers[min(i, len(answers) - 1)]
        if answer.startswith("ERROR "):
            sys.exit(answer[6:])
        print(answer)
        break
"""


class Cloud:
    """A PATH whose cloud commands are stand-ins, and what was called on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "scontrol", "scancel", "srun"):
            self.command(name, STAND_IN.format(python=sys.executable, folder=str(folder)))
        self.answers({})

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answers(self, answers: dict[str, list[str]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "XPK_", "SLURM_", "MADFORMER_"))}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(home)}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self) -> list[str]:
        """Every gcloud call in a word; of ssh calls the host.sh verb."""
        words = []
        for call in self.calls:
            remote = next((a for a in call if a.startswith("--command=")), "")
            found = re.search(r"host\.sh (\w+)", remote)
            words.append(found[1] if found else " ".join(call[3:5]))
        return words


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def option(call: list[str], name: str) -> str:
    return next(a.split("=", 1)[1] for a in call if a.startswith(name + "="))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# -- all scripts ------------------------------------------------------------------------------------------------------


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
        ("gke_xpk.sh", ["create", "--project=p", "--zone=z", "--type=v5p-8"], "--cluster"),
        ("gke_xpk.sh", ["stop", "--cluster=c", "--project=p", "--zone=z"], "--name"),
        ("gke_xpk.sh", ["run", "--cluster=c", "--project=p", "--zone=z", "--type=t", "--name=n", "--", "--a"], "gs://"),
        ("slurm.sh", ["--gpus=8", "--", "--config=c"], "--nodes"),
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


# -- tpu.sh -----------------------------------------------------------------------------------------------------------

STATE = "queued-resources describe"
NODE = "tpu-vm describe"
HOSTS = "host.sh status"


def test_create_waits_until_active(cloud: Cloud) -> None:
    cloud.answers({STATE: ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], NODE: ["CREATING", "READY"]})
    created = cloud.run("tpu.sh", "create", *TPU, "--type=v5litepod-16", "--spot", "--poll=0")
    assert created.returncode == 0, created.stderr
    request = cloud.calls[0]
    assert request[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run1"]
    for flag in (
        "--node-id=run1",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--project=proj",
        "--zone=us-west4-a",
    ):
        assert flag in request
    assert cloud.verbs.count(STATE) == 4


def test_create_is_on_demand_by_default_and_says_when_the_request_fails(cloud: Cloud) -> None:
    cloud.answers({STATE: ["FAILED"]})
    created = cloud.run("tpu.sh", "create", *TPU, "--type=v6e-16", "--poll=0")
    assert created.returncode == 1
    assert "came to nothing" in created.stderr
    assert "--spot" not in cloud.calls[0]
    assert "--runtime-version=v2-alpha-tpuv6e" in cloud.calls[0]


def test_settings_come_from_the_environment_too(cloud: Cloud) -> None:
    cloud.run("tpu.sh", "delete", TPU_NAME="other", TPU_PROJECT="p2", TPU_ZONE="z2")
    (call,) = cloud.calls
    assert {"other", "--project=p2", "--zone=z2", "--force"} <= set(call)


def test_install_copies_to_all_hosts_and_ends_with_the_setup_command(cloud: Cloud) -> None:
    installed = cloud.run("tpu.sh", "install", *TPU, "--setup=gcloud storage cp -r gs://b/d data")
    assert installed.returncode == 0, installed.stderr
    copy, install, setup = cloud.calls
    assert copy[3:5] == ["tpu-vm", "scp"]
    assert copy[6] == "run1:madformer_jax.tar.gz"
    assert "host.sh install" in option(install, "--command")
    assert option(setup, "--command") == "gcloud storage cp -r gs://b/d data"
    for call in cloud.calls:
        assert {"--worker=all", "--project=proj", "--zone=us-west4-a"} <= set(call)


def test_run_starts_all_hosts_with_the_arguments_unharmed(cloud: Cloud) -> None:
    cloud.answers({HOSTS: ["madformer h0 idle\nmadformer h1 done"]})
    started = cloud.run("tpu.sh", "run", *TPU, "--", *MAIN)
    assert started.returncode == 0, started.stderr
    start = cloud.calls[-1]
    assert "--worker=all" in start
    words = shlex.split(option(start, "--command"))
    assert words == ["bash", "madformer_jax/launch/host.sh", "start", "--", *MAIN, "--distributed"]


def test_run_refuses_while_any_host_still_runs(cloud: Cloud) -> None:
    cloud.answers({HOSTS: ["madformer h0 failed 1\nmadformer h1 running"]})
    refused = cloud.run("tpu.sh", "run", *TPU, "--", *MAIN)
    assert refused.returncode == 1
    assert "running already" in refused.stderr
    assert "start" not in cloud.verbs


def test_logs_follow_the_host_asked_for(cloud: Cloud) -> None:
    cloud.run("tpu.sh", "logs", *TPU, "--worker=3")
    assert "--worker=3" in cloud.calls[0]
    assert "tail" in option(cloud.calls[0], "--command")


def resume(cloud: Cloud) -> subprocess.CompletedProcess[str]:
    return cloud.run("tpu.sh", "resume", *TPU, "--type=v5p-8", "--spot", "--poll=0", "--", *MAIN)


@pytest.mark.parametrize(
    "preemption",
    [
        {STATE: ["ACTIVE", "SUSPENDING", "SUSPENDED", "ERROR NOT_FOUND: gone", "PROVISIONING", "ACTIVE"]},
        {STATE: ["ACTIVE", "ACTIVE", "ERROR NOT_FOUND: gone", "ACTIVE"], NODE: ["READY", "PREEMPTED", "READY"]},
    ],
    ids=["seen on the queued resource", "seen on the node"],
)
def test_resume_recreates_a_preempted_tpu_and_restarts_the_same_command(
    cloud: Cloud, preemption: dict[str, list[str]]
) -> None:
    hosts = ["madformer h0 running", "madformer h0 idle", "madformer h0 running", "madformer h0 done"]
    cloud.answers({NODE: ["READY"], HOSTS: hosts} | preemption)
    done = resume(cloud)
    assert done.returncode == 0, done.stderr
    acts = [v for v in cloud.verbs if "describe" not in v and v != "status"]
    again = ["queued-resources create", "stop", "tpu-vm scp", "install", "start"]
    assert acts == ["queued-resources delete", *again]
    start = next(c for c in cloud.calls if "host.sh start" in " ".join(c))
    assert shlex.split(option(start, "--command"))[4:] == [*MAIN, "--distributed"]


def test_resume_creates_what_is_missing_and_deletes_before_it_creates_again(cloud: Cloud) -> None:
    states = ["ERROR NOT_FOUND: no such resource", "ACTIVE", "SUSPENDED", "ERROR NOT_FOUND: gone", "ACTIVE"]
    hosts = ["madformer h0 idle", "madformer h0 idle", "madformer h0 done"]
    cloud.answers({STATE: states, NODE: ["READY"], HOSTS: hosts})
    done = resume(cloud)
    assert done.returncode == 0, done.stderr
    acts = [v for v in cloud.verbs if "describe" not in v and v != "status"]
    begin = ["queued-resources create", "stop", "tpu-vm scp", "install", "start"]
    assert acts == [*begin, "queued-resources delete", *begin]
    creates = [c for c in cloud.calls if "create" in c]
    assert creates[0] == creates[1]
    assert "--spot" in creates[0]


def test_resume_restarts_all_hosts_when_one_was_interrupted(cloud: Cloud) -> None:
    hosts = ["madformer h0 failed 1\nmadformer h1 interrupted", "madformer h0 done\nmadformer h1 done"]
    cloud.answers({STATE: ["ACTIVE"], NODE: ["READY"], HOSTS: hosts})
    done = resume(cloud)
    assert done.returncode == 0, done.stderr
    assert [v for v in cloud.verbs if v in ("stop", "install", "start", "queued-resources delete")] == [
        "stop",
        "install",
        "start",
    ]


def test_resume_ends_when_main_fails_and_waits_out_a_silent_cloud(cloud: Cloud) -> None:
    cloud.answers(
        {
            STATE: ["ERROR network is unreachable", "ACTIVE"],
            NODE: ["READY"],
            HOSTS: ["ERROR ssh: no route", "madformer h0 running\nmadformer h1 done", "madformer h0 failed 2"],
        }
    )
    failed = resume(cloud)
    assert failed.returncode == 1
    assert "failed 2" in failed.stderr
    assert "delete" in failed.stderr
    assert set(cloud.verbs) == {STATE, NODE, "status"}, "nothing was created, started or deleted"


# -- host.sh ----------------------------------------------------------------------------------------------------------

# Stands in for main.py: writes what it was told, exits as --exit says, or saves on SIGTERM and exits with 0.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
def save(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if "=" in a)
print("arguments", *sys.argv[1:], "on", os.environ.get("JAX_PLATFORMS"), flush=True)
Path(arguments["ready"] + arguments.get("process_id", "")).touch()
if "exit" in arguments and arguments.get("only", "") in ("", arguments.get("process_id")):
    sys.exit(int(arguments["exit"]))
if "deaf" in arguments:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return f"{sys.executable} -u {path}"


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
    cloud.run("host.sh", "start", "--", f"--ready={tmp_path}/r", f"--exit={code}", MADFORMER_COMMAND=program)
    wait_for(lambda: not cloud.run("host.sh", "status").stdout.endswith(" running\n"))
    assert cloud.run("host.sh", "status").stdout.endswith(f" {word}\n")


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


# -- gke_xpk.sh -------------------------------------------------------------------------------------------------------

GKE = ("--cluster=c1", "--project=proj", "--zone=us-west4-a")


@pytest.mark.parametrize(
    ("setting", "capacity"), [((), "--on-demand"), (("--spot",), "--spot"), (("--reservation=r",), "--reservation=r")]
)
def test_gke_create(cloud: Cloud, setting: tuple[str, ...], capacity: str) -> None:
    cloud.run("gke_xpk.sh", "create", *GKE, "--type=v5litepod-16", *setting)
    (call,) = cloud.calls
    assert call[:3] == ["xpk", "cluster", "create"]
    assert {"--tpu-type=v5litepod-16", "--num-slices=1", capacity, *GKE} <= set(call)
    assert len({"--on-demand", "--spot", "--reservation=r"} & set(call)) == 1


def test_gke_run_gives_time_to_save_and_restarts(cloud: Cloud) -> None:
    run = cloud.run("gke_xpk.sh", "run", *GKE, "--type=v5p-8", "--name=w1", "--", *MAIN)
    assert run.returncode == 0, run.stderr
    (call,) = cloud.calls
    assert call[:3] == ["xpk", "workload", "create"]
    assert {"--workload=w1", "--tpu-type=v5p-8", "--restart-on-user-code-failure", *GKE} <= set(call)
    assert int(option(call, "--max-restarts")) > 0
    assert int(option(call, "--termination-grace-period-seconds")) >= 60
    words = shlex.split(option(call, "--command"))
    assert words == ["exec", "bash", "launch/host.sh", "container", "--", *MAIN, "--distributed"]


def test_gke_logs_stop_and_delete(cloud: Cloud) -> None:
    for verb in ("logs", "stop", "delete"):
        assert cloud.run("gke_xpk.sh", verb, *GKE, "--name=w1").returncode == 0
    credentials, logs, stop, delete = cloud.calls
    assert {"c1", "--project=proj", "--region=us-west4"} <= set(credentials)
    assert "--selector=jobset.sigs.k8s.io/jobset-name=w1" in logs
    assert stop[1:3] == ["workload", "delete"]
    assert "--workload=w1" in stop
    assert delete[1:3] == ["cluster", "delete"]
    assert set(GKE) <= set(delete)


# -- Slurm ------------------------------------------------------------------------------------------------------------


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


def test_slurm_job_that_ends_by_itself_is_not_queued_again(cloud: Cloud) -> None:
    assert cloud.run("slurm.sbatch", *MAIN, SLURM_JOB_ID="7").returncode == 0
    assert [c[0] for c in cloud.calls] == ["srun"]


# -- local.sh ---------------------------------------------------------------------------------------------------------


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
