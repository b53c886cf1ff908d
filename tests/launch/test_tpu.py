"""launch/tpu.sh against a stand-in for gcloud."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, MAIN, TPU, Cloud, is_running, option, wait_for

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
    asked = next(c for c in cloud.calls if "host.sh status" in " ".join(c))
    words = shlex.split(option(asked, "--command").partition("host.sh ")[2].partition("; else")[0])
    assert words == ["status", "--", *MAIN, "--distributed"], "what another command has left is not this one's"


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


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda x: str(int(x)))
def test_a_signal_ends_the_wait_at_once_and_leaves_nothing(
    cloud: Cloud, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    cloud.answers({STATE: ["PROVISIONING"]})
    cloud.command(
        "sleep",
        f'#!/bin/sh\necho "$$" >{tmp_path}/slept.new\nmv {tmp_path}/slept.new {tmp_path}/slept\nexec /bin/sleep "$@"\n',
    )
    command = ["bash", str(LAUNCH / "tpu.sh"), "create", *TPU, "--type=v6e-16", "--poll=30"]
    environment = cloud.environment | {"TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        wait_for(lambda: STATE in cloud.verbs)
        wait_for((tmp_path / "slept").exists)
        os.killpg(process.pid, number) if group else process.send_signal(number)
        process.communicate(timeout=20)
        sleep = int((tmp_path / "slept").read_text())
        wait_for(lambda: not is_running(sleep))
        assert process.returncode not in (0, None)
    assert not any((tmp_path / "scratch").iterdir())
