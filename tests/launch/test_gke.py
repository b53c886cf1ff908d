"""launch/gke_xpk.sh against stand-ins for xpk and kubectl."""

import shlex

import pytest

from tests.launch.cloud import MAIN, Cloud, option

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


@pytest.mark.parametrize("verb", ["create", "run"])
def test_gke_joins_slices(cloud: Cloud, verb: str) -> None:
    setting = (*GKE, "--type=v5litepod-16", "--name=w", "--slices=2")
    assert cloud.run("gke_xpk.sh", verb, *setting, "--", *MAIN).returncode == 0
    assert option(cloud.calls[0], "--num-slices") == "2"
    refused = cloud.run("gke_xpk.sh", verb, *setting[:-1], "--slices=two", "--", *MAIN)
    assert refused.returncode != 0
    assert "--slices=two is not a number of slices" in refused.stderr


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


def test_gke_array_is_a_workload_a_slice(cloud: Cloud) -> None:
    setting = (*GKE, "--type=v5p-8", "--name=w", "--array=2")
    run = cloud.run("gke_xpk.sh", "run", *setting, "--", *MAIN, "--mode=sweep")
    assert run.returncode == 0, run.stderr
    assert [option(call, "--workload") for call in cloud.calls] == ["w-0", "w-1"]
    words = shlex.split(option(cloud.calls[1], "--command"))
    assert words[:6] == ["export", "MADFORMER_INDEX=1;", "exec", "bash", "launch/host.sh", "container"]


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
