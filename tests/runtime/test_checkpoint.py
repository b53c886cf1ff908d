import errno
import logging
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config.table import FIELDS
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, checksums, partitioning, storage
from madformer_jax.training import train_step
from tests import paths, tiny


def test_a_state_survives_other_numbers_of_devices(tmp_path):
    """8 -> 2 -> 1 -> 8 devices, over three kinds of mesh; bit for bit, and on today's mesh each time."""
    s = train_step.make_setup(tiny.get_config("plain"))

    def on(*sizes):
        mesh = partitioning.make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))])
        _, abstract = train_step.create_state(s.model, s.tx, 0, mesh)
        return checkpoint.array_items(abstract)

    rng = np.random.default_rng(0)  # compiling the initial state would take longer than all else
    first = jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), on(2, 2, 2))
    arrays = first
    for number, sizes in enumerate([(1, 2, 1), (1, 1, 1), (1, 4, 2)]):
        targets = on(*sizes)
        with checkpoint.Checkpoints(str(tmp_path / str(number))) as checkpoints:
            checkpoints.save(number, arrays, {"next_batch": 7}, {"step": number})
            checkpoints.wait()
            step, arrays, data = checkpoints.restore(targets, data=True)
        assert (step, data) == (number, {"next_batch": 7})
        assert jax.tree.map(lambda x: x.sharding, arrays) == jax.tree.map(lambda x: x.sharding, targets)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(arrays), jax.device_get(first))


def arrays(value):
    tree = {"w": jax.random.normal(jax.random.key(0), (256, 128)), "b": jnp.full((5,), value)}  # w does not compress
    return dict.fromkeys(checkpoint.ARRAY_ITEMS, tree)


def targets():
    sharding = partitioning.replicated(partitioning.make_mesh(8, 1, 1))
    shapes = jax.eval_shape(lambda: arrays(0.0)["params"])
    return {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)}


def all_targets():
    return dict.fromkeys(checkpoint.ARRAY_ITEMS, targets()["params"])


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
def test_a_truncated_checkpoint_is_logged_and_the_one_before_is_used(workdir, caplog, item, share):
    files = [p for p in (workdir / "checkpoints" / "2" / item).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: (p.name == "metadata", p.stat().st_size))  # of "data", the file with the state
    content = largest.read_bytes()
    largest.write_bytes(content[: int(share * len(content))])
    with caplog.at_level(logging.ERROR):
        assert_goes_on_from(workdir, 1)
    assert "the checkpoint of step 2 in" in caplog.text
    assert (workdir / "checkpoints" / "broken_2").exists()


def test_one_flipped_byte_in_any_file_is_noticed_before_it_is_used(workdir, caplog):
    """And its file is named, in one line. What Orbax notes beside the items is not used."""
    step = workdir / "checkpoints" / "2"
    files = sorted(p for p in step.rglob("*") if p.is_file())
    assert len(files) > 30
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        for path in files:
            content = path.read_bytes()
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            caplog.clear()
            found, trees, data = checkpoints.restore(all_targets(), data=True)
            path.write_bytes(content)
            assert {float(trees[name]["b"][0]) for name in checkpoint.ARRAY_ITEMS} == {found} == {data["next_batch"]}, (
                path
            )
            if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
                assert found == 2 and not caplog.text, path
            else:
                assert found == 1, path
                assert f"the checkpoint of step 2 in {step.parent} cannot be used: " in caplog.text, path
                name = str(path.relative_to(step))
                assert name in caplog.text or (path.name == "checksums.json" and name.partition("/")[0] in caplog.text)
                assert len(caplog.records) == 1, caplog.text


def test_a_step_without_its_checksums_is_not_finished(workdir, monkeypatch):
    """They are written before it counts: a process that dies in between leaves an unfinished step."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_json", fail)
    save = checkpoint.Checkpoints(str(workdir), keep=5)
    save.save(3, arrays(3.0), {"next_batch": 3}, {"step": 3})
    with pytest.raises(ConfigError, match="step 2 is the last good one: No space left on device.$"):
        save.wait()
    monkeypatch.undo()
    assert_goes_on_from(workdir, 2)


def test_transient_errors_are_tried_again_and_others_end_it(workdir, monkeypatch, caplog):
    """And no good checkpoint is taken for a broken one."""
    failures: list[OSError] = []

    def sometimes(path, read=storage.sha256):
        if failures and path.match("2/params/_METADATA"):
            raise failures.pop()
        return read(path)

    monkeypatch.setattr(storage, "sha256", sometimes)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with checkpoint.Checkpoints(str(workdir), keep=5) as checkpoints:
        failures[:] = [OSError(errno.EIO, "Input/output error"), TimeoutError("timed out")]
        assert checkpoints.restore(all_targets())[0] == 2
        for error, count in (
            (OSError(errno.EIO, "Input/output error"), 9),
            (PermissionError(13, "Permission denied"), 1),
        ):
            failures[:] = [error] * count
            with pytest.raises(ConfigError, match=f"step 2 in .* cannot be read: {error.strerror}.$"):
                checkpoints.restore(all_targets())
        checkpoints.drop_after(1)
    assert not list((workdir / "checkpoints").glob("broken*"))


def test_one_step_can_be_chosen(workdir):
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        assert checkpoints.restore(targets(), step=1)[0] == 1
        assert checkpoints.meta(1) == {"step": 1}
        with pytest.raises(ConfigError, match="no checkpoint of step 7 in .*, only of 1, 2.$"):
            checkpoints.restore(targets(), step=7)
        (workdir / "checkpoints" / "2" / "meta" / "metadata").write_text('{"step": 3}')
        with pytest.raises(ConfigError, match="meta is damaged"):
            checkpoints.meta(2)
        with pytest.raises(ConfigError, match="restored: 2/meta/metadata is not what was written"):
            checkpoints.restore(targets(), step=2)


def test_a_target_of_another_shape_is_no_damage(workdir, caplog):
    wrong = targets()
    wrong["params"]["b"] = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=wrong["params"]["b"].sharding)
    with (
        checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints,
        pytest.raises(ConfigError, match="cannot be restored into this config's arrays") as error,
    ):
        checkpoints.restore(wrong)
    assert "\n" not in str(error.value) and not caplog.text


def test_a_config_binds_from_the_first_checkpoint_on(tmp_path, workdir):
    c = tiny.get_config("plain")
    for folder in (tmp_path / "new", workdir):
        checkpoint.write_config(c, str(folder))
    c.model.width += 8
    checkpoint.check_config(c, str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="config.model.width was 16 and is 24"):
        checkpoint.check_config(c, str(workdir))
    (workdir / "config.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        checkpoint.check_config(c, str(workdir))


@pytest.mark.parametrize("name", checkpoint.ON_OFF_FIELDS)
def test_a_part_of_the_state_may_change_its_value_but_not_come_or_go(workdir, name):
    c = tiny.get_config("plain")
    for before, now, is_kept in ((2, 4, True), (2, 0, False), (0, 2, False)):
        c.update_from_flattened_dict({name: type(FIELDS[name].default)(before)})
        checkpoint.write_config(c, str(workdir))
        c.update_from_flattened_dict({name: type(FIELDS[name].default)(now)})
        if is_kept:
            checkpoint.check_config(c, str(workdir))
        else:
            with pytest.raises(ConfigError, match=f"config.{name} was {before}.* and is {now}"):
                checkpoint.check_config(c, str(workdir))


def test_a_checkpoint_without_an_item_is_no_checkpoint(workdir):
    (checkpoint.folder(str(workdir)) / "2" / "params").rename(workdir / "gone")
    assert_goes_on_from(workdir, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("saved")
    with checkpoint.Checkpoints(str(folder)) as checkpoints:
        checkpoints.save(1, arrays(1.0), {}, {"step": 1})
    return folder


def refusal(folder, write):
    """Why checkpoints cannot be written, or read, in a folder; "" if they can."""
    try:
        storage.check_arrays_path(folder, write)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", paths.NAMES)
def test_under_any_name_a_checkpoint_is_whole_or_refused_at_once(tmp_path, saved, name):
    workdir = tmp_path / name
    if why := refusal(workdir, write=True):
        assert any(repr(character) in why for character in name) and "\n" not in why
        with pytest.raises(ConfigError, match="does not support '.*' in its path"):
            checkpoint.Checkpoints(str(workdir))
        assert not workdir.exists()
        shutil.copytree(saved, workdir)
    else:
        with checkpoint.Checkpoints(str(workdir)) as checkpoints:
            checkpoints.save(1, arrays(1.0), {}, {"step": 1})
        sums = storage.read_json(workdir / "checkpoints" / "1" / "params" / "checksums.json")["sha256"]
        assert "manifest.ocdbt" in sums
    assert bool(refusal(workdir, write=False)) == ("\\" in name)  # all others can be read
    if "\\" in name:
        with pytest.raises(ConfigError, match="files cannot be addressed here"):
            checkpoint.Checkpoints(str(workdir), read_only=True)
        return
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        assert float(checkpoints.restore(targets())[1]["params"]["b"][0]) == 1
        assert checksums.array_shapes(checkpoints.abstract_tree("ema")) == {"w": (256, 128), "b": (5,)}


def test_a_save_that_cannot_be_restored_does_not_count(workdir, monkeypatch, caplog):
    """Orbax leaves the files of its processes unmerged, without an error, in a folder whose name is a pattern."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(storage, "check_arrays_path", lambda *args, **settings: None)
    odd = workdir / "a[1]"
    shutil.copytree(workdir / "checkpoints", odd / "checkpoints")
    caplog.clear()
    save = checkpoint.Checkpoints(str(odd))
    save.save(3, arrays(3.0), {"next_batch": 3}, {"step": 3})
    with pytest.raises(ConfigError, match="cannot be written; step 2 is the last good one"):
        save.wait()
    assert "saved step" not in caplog.text
    with checkpoint.Checkpoints(str(odd), read_only=True) as checkpoints:
        assert checkpoints.restore(targets())[0] == 2


def until_nothing_writes(folder):
    """Until no file below `folder` has come or gone for a moment."""
    seen = None
    while seen != (seen := sorted(folder.rglob("*"))):
        time.sleep(0.2)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(workdir, caplog):
    """A limit on the size of files stands in for it: writing fails half-way, as on a full disk."""
    many = {str(i): jax.random.normal(jax.random.key(0), (128, 128)) for i in range(30)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        with checkpoint.Checkpoints(str(workdir), keep=5) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            checkpoints.save(3, dict.fromkeys(checkpoint.ARRAY_ITEMS, many), {"next_batch": 3}, {"step": 3})
            checkpoints.wait()

    try:
        with pytest.raises(
            ConfigError, match="cannot be written; step 2 is the last good one: File too large"
        ) as error:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    until_nothing_writes(workdir / "checkpoints")  # TensorStore's threads, which end with the process
    assert_goes_on_from(workdir, 2)


def test_of_checkpoints_kept_for_ever_the_averages_stay(tmp_path):
    with checkpoint.Checkpoints(str(tmp_path), keep=1, keep_every=[2]) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, arrays(float(step)), {"next_batch": step}, {"step": step})
    items = {int(path.name): {item.name for item in path.iterdir()} for path in (tmp_path / "checkpoints").iterdir()}
    assert sorted(items) == [2, 4, 5]
    assert items[5] > {*checkpoint.ARRAY_ITEMS, "data", "meta"}
    assert items[2] == items[4] == items[5] - {"params", "opt", "data"}
    with checkpoint.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert checkpoints.meta(2)["step"] == 2
        assert float(checkpoints.restore({"ema": targets()["params"]}, step=2)[1]["ema"]["b"][0]) == 2
        with pytest.raises(ConfigError, match="step 2 holds no params, only ema, power_ema, meta"):
            checkpoints.restore({"params": {}}, step=2)
        assert checkpoints.restore(targets(), data=True)[::2] == (5, {"next_batch": 5})
