import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import memory, partitioning

MIB = 2**20


def machine(root, files):
    """A root folder with these files in it, as the kernel would show them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


MEMINFO = {"proc/meminfo": f"MemTotal: {200 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {100 * 1024} kB\n"}
STAT = f"{{0}}inactive_file {2 * MIB}\n{{0}}active_file {1 * MIB}\n{{0}}inactive_anon {9 * MIB}\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 100),
        ({"proc/self/cgroup": "3:cpu:/\n0::/\n"}, 100),  # the root group has no limit
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": str(50 * MIB),
                "sys/fs/cgroup/job/memory.current": str(20 * MIB),
                "sys/fs/cgroup/job/memory.stat": STAT.format(""),
            },
            33,
        ),
        (  # the outer group is the narrower one
            {
                "proc/self/cgroup": "0::/jobs/one\n",
                "sys/fs/cgroup/jobs/one/memory.max": "max\n",
                "sys/fs/cgroup/jobs/memory.max": str(10 * MIB),
                "sys/fs/cgroup/jobs/memory.current": str(8 * MIB),
                "sys/fs/cgroup/jobs/memory.stat": "",
            },
            2,
        ),
        (  # version 1, in a container: the group's path is not there, its mount is
            {
                "proc/self/cgroup": "4:memory,cpu:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(30 * MIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(9 * MIB),
                "sys/fs/cgroup/memory/memory.stat": STAT.format("total_"),
            },
            24,
        ),
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_its_control_groups(tmp_path, files, free):
    assert memory.host_free_bytes(machine(tmp_path, MEMINFO | files)) == free * MIB


def test_this_machine_has_memory():
    assert memory.host_free_bytes() > 0


def abstract(shape, mesh):
    boxed = {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), ("embed", "heads"))}
    return partitioning.abstract_arrays(nn.meta.unbox(boxed), partitioning.shardings(boxed, mesh))


def test_a_state_larger_than_the_machine_is_refused_with_the_needed_and_the_free_memory(monkeypatch):
    mesh = partitioning.make_mesh(2, 2, 2)
    trees = {"parameters": abstract((1024, 4096), mesh), "optimizer": abstract((4096, 8192), mesh)}
    # eight devices hold a quarter each, all of it in this machine's memory: 2 * (16 + 128) MiB
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 288 * MIB - 1)
    with pytest.raises(ConfigError) as error:
        memory.check_state_fits("training", mesh, **trees)
    line = str(error.value)
    assert "\n" not in line
    for message in ("training needs 0.28 GiB (parameters 0.03, optimizer 0.25)", "0.28 GiB free", "config.mesh.fsdp"):
        assert message in line
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 288 * MIB)
    memory.check_state_fits("training", mesh, **trees)


def test_a_device_with_memory_of_its_own_is_asked_for_it(monkeypatch):
    mesh = partitioning.make_mesh(-1, 1, 1, jax.devices()[:1])
    tree = abstract((1024, 1024), mesh)
    stats = {"bytes_limit": 5 * MIB, "bytes_in_use": MIB}
    device = type("Device", (), {"memory_stats": lambda self: stats, "device_kind": "TPU v5 lite"})()
    fake = type("Mesh", (), {"local_devices": [device]})()
    memory.check_state_fits("sampling", fake, parameters=tree)
    stats["bytes_in_use"] += 1
    with pytest.raises(ConfigError, match=r"sampling needs 0\.00 GiB .* but a TPU v5 lite has"):
        memory.check_state_fits("sampling", fake, parameters=tree)
