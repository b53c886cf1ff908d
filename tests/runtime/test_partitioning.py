import logging
import signal
import threading
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from madformer_jax.cost import topologies
from madformer_jax.errors import ConfigError
from madformer_jax.modes import prepare
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import generation
from madformer_jax.training import train_step
from tests import tiny


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((1, 1, -1), (1, 1, 8))],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    assert tuple(partitioning.make_mesh(*sizes).shape.values()) == shape


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused_in_one_line(sizes):
    with pytest.raises(ConfigError, match=r"config\.mesh: data=") as error:
        partitioning.make_mesh(*sizes)
    assert "\n" not in str(error.value)


def test_slices_of_tpus_lie_along_data():
    pytest.importorskip("libtpu")
    devices = topologies.topology_devices("v5e:2x2@2")
    mesh = partitioning.make_mesh(-1, 4, 1, devices)
    assert [{x.slice_index for x in row.ravel()} for row in mesh.devices] == [{0}, {1}]
    mesh = partitioning.make_mesh(4, 1, 2, devices)
    assert [{x.slice_index for x in row.ravel()} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match="data=1 is not a multiple of the 2 slices"):
        partitioning.make_mesh(1, -1, 1, devices)


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_the_table_splits_parameters_and_spends_fsdp_on_the_batch_of_activations():
    mesh = partitioning.make_mesh(2, 2, 2)
    tree = {
        "qkv": boxed((3, 8, 12), "layers", "embed", "heads"),
        "activation": boxed((8, 4, 6, 10), "batch", "blocks", "tokens", "embed"),
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    }
    specs = jax.tree.map(lambda s: s.spec, partitioning.shardings(tree, mesh))
    assert specs["qkv"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["activation"] == PartitionSpec(("data", "fsdp"), None, None, None)
    assert specs["scalar"] == PartitionSpec()


def test_dimensions_that_an_axis_does_not_divide_are_replicated_and_the_largest_named(caplog):
    mesh = partitioning.make_mesh(2, 4, 1)
    tree = {"mlp": boxed((6, 512, 1024), "embed", "mlp", "layers"), "small": boxed((7, 6), "embed", "mlp")}
    with caplog.at_level(logging.WARNING):
        found = partitioning.shardings(tree | {"fits": boxed((8,), "embed")}, mesh)
    assert found["mlp"].spec == PartitionSpec(None, "tensor", None)
    (message,) = caplog.messages
    assert "2 arrays, 0.012 GiB" in message
    assert "mlp, dimension 0 of (6, 512, 1024); config.mesh.fsdp = 4 where 2 would do" in message


def test_bytes_of_a_device_count_its_own_part_only():
    mesh = partitioning.make_mesh(2, 2, 2)
    tree = {"a": boxed((8, 12), "embed", "heads"), "b": boxed((10,), "norm")}
    abstract = partitioning.abstract_arrays(nn.meta.unbox(tree), partitioning.shardings(tree, mesh))
    assert partitioning.device_bytes(abstract) == 4 * (8 * 12 // 4 + 10)


def test_a_global_batch_comes_back_in_order():
    mesh = partitioning.make_mesh(2, 2, 2)
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    batch = partitioning.global_batch({"x": rows}, mesh)
    assert batch["x"].sharding.shard_shape(batch["x"].shape) == (2, 3)
    np.testing.assert_array_equal(partitioning.to_host(batch, mesh)["x"], rows)
    assert partitioning.batch_share(mesh, 8) == (0, 1)


def test_gathering_for_the_host_is_compiled_once(monkeypatch):
    mesh = partitioning.make_mesh(2, 2, 2)
    x = partitioning.global_batch({"x": np.arange(8.0)}, mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = partitioning._gather(mesh)
    compiled = gather._cache_size()
    for _ in range(2):
        np.testing.assert_array_equal(partitioning.to_host(x, mesh)["x"], np.arange(8.0))
    assert gather._cache_size() == compiled + 1


@pytest.mark.parametrize(("heads", "mlp_width", "named"), [(3, 8, "heads=3"), (4, 7, "mlp_width=7")])
def test_a_tensor_axis_that_does_not_divide_the_layers_is_refused(heads, mlp_width, named):
    mesh = partitioning.make_mesh(2, 2, 2)
    partitioning.check_tensor(mesh, heads=4, mlp_width=8)
    with pytest.raises(ConfigError, match=f"config.model.{named} is not a multiple of the 2 devices"):
        partitioning.check_tensor(mesh, heads=heads, mlp_width=mlp_width)
    model = types.SimpleNamespace(config=types.SimpleNamespace(heads=heads, mlp_width=mlp_width))
    with pytest.raises(ConfigError, match=named):
        generation.abstract_params(model, mesh)
    with pytest.raises(ConfigError, match=named):
        train_step.create_state(model, optax.sgd(0.1), 0, mesh)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    mesh = partitioning.make_mesh(2, 2, 2)
    with pytest.raises(
        ConfigError, match=r"microbatch of 6 images .* the 4 devices .*: set train.batch to a multiple of 4"
    ):
        partitioning.batch_share(mesh, 6)
    with pytest.raises(ConfigError, match=r"microbatch of 2 images .*: set train.accumulate=4"):
        partitioning.batch_share(mesh, 16, 8)


def test_a_coordinator_needs_its_numbers():
    with pytest.raises(ConfigError, match="--num_processes and --process_id"):
        partitioning.distributed_init("localhost:1", -1, -1)


def test_processes_that_do_not_come_end_the_wait_with_one_line(monkeypatch, capsys):
    ended = threading.Event()
    statuses = []

    def end(status):
        statuses.append(status)
        ended.set()

    monkeypatch.setattr(partitioning.os, "_exit", end)
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: ended.wait(20))
    partitioning.distributed_init("localhost:1", 3, 1, timeout=0)
    assert statuses == [2]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: not all of 3 processes came within 0 s at localhost:1: check")


def test_a_process_that_joined_nobody_ends_on_sigterm(monkeypatch):
    """Though JAX's notifier takes the signal, as it does where there are others to tell."""
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    partitioning.distributed_init("localhost:1", 1, 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    partitioning.distributed_init("localhost:1", 2, 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    c = tiny.get_config()
    c.data.source, c.data.path = "folder", "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        prepare.run(c, "out")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_parameters_are_counted_by_part_and_listed_in_a_file(tmp_path, caplog):
    params = {"boi": jnp.zeros((3, 5)), "unet": {"conv": {"kernel": jnp.zeros(7), "bias": jnp.zeros(2)}}}
    with caplog.at_level("INFO"):
        partitioning.log_overview(params, params, tmp_path / "parameters.txt")
    assert "24 parameters: boi 15, unet 9" in caplog.text
    lines = (tmp_path / "parameters.txt").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines if line.startswith("|")][1:]
    assert rows == [
        ["boi", "(3, 5)", "float32", "15"], ["unet/conv/bias", "(2,)", "float32", "2"], ["unet/conv/kernel", "(7,)", "float32", "7"],
    ]  # fmt: skip
