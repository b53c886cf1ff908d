import logging
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax import training
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, partitioning
from tests import tiny


def test_a_state_survives_other_numbers_of_devices(tmp_path):
    """8 -> 2 -> 1 -> 8 devices, over three kinds of mesh; bit for bit, and on today's mesh each time."""
    s = training.setup(tiny.get_config("plain"))

    def on(*sizes):
        mesh = partitioning.make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))])
        return training.create_state(s.model, s.tx, 0, mesh)

    create, _ = on(2, 2, 2)
    state = create()
    first = {name: getattr(state, name) for name in checkpoint.ARRAYS}
    arrays = first
    for number, sizes in enumerate([(1, 2, 1), (1, 1, 1), (1, 4, 2)]):
        abstract = on(*sizes)[1]
        targets = {name: getattr(abstract, name) for name in checkpoint.ARRAYS}
        with checkpoint.Checkpoints(str(tmp_path / str(number))) as checkpoints:
            checkpoints.save(number, arrays, {"next_batch": 7}, {"step": number})
            checkpoints.wait()
            step, arrays, data = checkpoints.restore(targets, data=True)
        assert (step, data) == (number, {"next_batch": 7})
        assert jax.tree.map(lambda x: x.sharding, arrays) == jax.tree.map(lambda x: x.sharding, targets)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(arrays), jax.device_get(first))


def arrays(value):
    tree = {"w": jax.random.normal(jax.random.key(0), (256, 128)), "b": jnp.full((5,), value)}  # w does not compress
    return dict.fromkeys(checkpoint.ARRAYS, tree)


def targets():
    sharding = partitioning.replicated(partitioning.make_mesh(8, 1, 1))
    shapes = jax.eval_shape(lambda: arrays(0.0)["params"])
    return {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)}


@pytest.fixture
def workdir(tmp_path):
    """With the checkpoints of steps 1 and 2."""
    with checkpoint.Checkpoints(str(tmp_path), keep=5) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, arrays(float(step)), {"next_batch": step}, {"step": step})
    return tmp_path


def assert_goes_on_from(workdir, step):
    with checkpoint.Checkpoints(str(workdir), keep=5) as checkpoints:
        found, trees, data = checkpoints.restore(targets(), data=True)
        assert (found, data) == (step, {"next_batch": step})
        assert float(trees["params"]["b"][0]) == step
        checkpoints.drop_after(found)
        checkpoints.save(3, arrays(3.0), {"next_batch": 3}, {"step": 3})
    with checkpoint.Checkpoints(str(workdir), keep=5) as checkpoints:
        assert checkpoints.restore(targets())[0] == 3


@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize("item", ["params", "data"])
def test_a_checkpoint_cut_off_is_told_and_the_one_before_is_used(workdir, caplog, item, share):
    files = [p for p in (workdir / "checkpoints" / "2" / item).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: (p.name == "metadata", p.stat().st_size))  # of "data", the file with the state
    content = largest.read_bytes()
    largest.write_bytes(content[: int(share * len(content))])
    with caplog.at_level(logging.ERROR):
        assert_goes_on_from(workdir, 1)
    assert "the checkpoint of step 2 in" in caplog.text
    assert (workdir / "checkpoints" / "broken_2").exists()


def test_a_checkpoint_without_an_item_is_no_checkpoint(workdir):
    (checkpoint.folder(str(workdir)) / "2" / "params").rename(workdir / "gone")
    assert_goes_on_from(workdir, 1)


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(workdir):
    """A limit on the size of files stands in for it: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        with checkpoint.Checkpoints(str(workdir), keep=5) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            checkpoints.save(3, arrays(3.0), {"next_batch": 3}, {"step": 3})
            checkpoints.wait()

    try:
        with pytest.raises(
            ConfigError, match="cannot be written; step 2 is the last good one: File too large"
        ) as error:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert_goes_on_from(workdir, 2)
