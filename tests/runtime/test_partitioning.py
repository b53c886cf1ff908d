import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import partitioning


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


def test_a_dimension_that_an_axis_does_not_divide_is_replicated_and_named(caplog):
    mesh = partitioning.make_mesh(2, 2, 2)
    with caplog.at_level(logging.WARNING):
        sharding = partitioning.shardings({"mlp": boxed((7, 6), "embed", "mlp")}, mesh)["mlp"]
    assert sharding.spec == PartitionSpec(None, "tensor")
    assert "mlp: dimension 0 of (7, 6)" in caplog.text


def test_bytes_of_a_device_count_its_own_part_only():
    mesh = partitioning.make_mesh(2, 2, 2)
    tree = {"a": boxed((8, 12), "embed", "heads"), "b": boxed((10,), "norm")}
    abstract = partitioning.abstract(nn.meta.unbox(tree), partitioning.shardings(tree, mesh))
    assert partitioning.device_bytes(abstract) == 4 * (8 * 12 // 4 + 10)


def test_a_global_batch_comes_back_in_order():
    mesh = partitioning.make_mesh(2, 2, 2)
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    batch = partitioning.global_batch({"x": rows}, mesh)
    assert batch["x"].sharding.shard_shape(batch["x"].shape) == (2, 3)
    np.testing.assert_array_equal(partitioning.to_host(batch, mesh)["x"], rows)
    assert partitioning.batch_share(mesh, 8) == (0, 1)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch of 6 images is not a multiple of the 4 devices"):
        partitioning.batch_share(partitioning.make_mesh(2, 2, 2), 6)


def test_a_coordinator_needs_its_numbers():
    with pytest.raises(ConfigError, match="--num_processes and --process_id"):
        partitioning.distributed_init("localhost:1", -1, -1)
