"""Checkpoints of a run: parameters, EMA, optimizer and data iterator in one atomic Orbax step.

A workdir holds `config.json` and `checkpoints/<step>/` with the items `params`, `ema`, `opt`, `data`,
`meta` and, with `train.ema_snapshots`, `power_ema`. Training saves and restores all of them; sampling
reads one; `--mode=export` writes `ema` and `meta`. Arrays are restored with the shardings of the
current mesh, so that a run may continue on any mesh. Checksums of files are verified before use.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from madformer_jax.config import aliases, fields, identity
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checksums, malloc, orbax_logging, provenance, storage
from madformer_jax.runtime.partitioning import sync

ARRAY_ITEMS = ("params", "ema", "opt", "power_ema")
T = TypeVar("T")

LEARNING_RATE_FIELDS = ("optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup", "optimizer.decay")
# The state depends on whether these are 0, not on their values.
ON_OFF_FIELDS = ("optimizer.clip", "optimizer.skip", "train.ema_snapshots")
# Sections and fields that decide the shapes of weights and images.
MODEL_FIELDS = (
    "model", "codec", "text.vocabulary", "text.length", "data.image_size", "data.channels", "train.elastic_depth",
    "train.elastic_depths",
)  # fmt: skip


def array_items(state: Any) -> dict[str, Any]:
    """Returns item -> tree of a training state, without items that have no arrays."""
    return {name: tree for name in ARRAY_ITEMS if jax.tree.leaves(tree := getattr(state, name))}


def folder(workdir: str) -> epath.Path:
    return storage.absolute(workdir) / "checkpoints"


def read_config(workdir: str) -> dict[str, Any] | None:
    """Returns the config that the workdir was made with, as nested plain values; None for a fresh workdir."""
    content = storage.read_json_object(path := epath.Path(workdir) / "config.json")
    return None if content is None else aliases.current_names(content, str(path))


def check_config(config: ConfigDict, workdir: str, sections: tuple[str, ...] = ()) -> None:
    """Checks that a config may continue the run of a workdir; see `differences`.

    Raises:
      ConfigError: Fields differ. The message has both values of each.
    """
    if different := resume_conflicts(config, workdir, sections):
        raise ConfigError(
            f"{workdir} was made by another config: {'; '.join(different)}. Set it back, or use another --workdir."
        )


def resume_conflicts(config: ConfigDict, workdir: str, sections: tuple[str, ...] = ()) -> list[str]:
    """Lists the fields that differ from the workdir's config and may not change when its run is resumed.

    Fields that only one config has are ignored. Without a checkpoint any config may start the run.

    Args:
      config: The current config.
      workdir: The folder of the run.
      sections: Sections or fields to compare; empty for all.
    """
    stored = read_config(workdir) if exists(workdir) else None
    before, now = fields.flat(stored or {}), fields.flat(json.loads(config.to_json()))
    if not now.get("codec.scaling_factor"):  # it stands for the factors of the VAE; pixels have none
        before = {name: x for name, x in before.items() if name not in ("codec.scaling_factor", "codec.shift_factor")}
    return [
        f"config.{name} was {before[name]!r} and is {now[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name] and not identity.may_change_on_resume(name)
        if not sections or {name, name.split(".")[0]} & set(sections)
        if not (name in ON_OFF_FIELDS and before[name] and now[name])
    ]


def write_config(config: ConfigDict, workdir: str) -> None:
    """Creates the workdir and writes `config.json`, in process 0.

    Raises:
      ConfigError: The workdir cannot be written.
    """
    provenance.record(json.loads(config.to_json()))  # on the machine of each process
    if jax.process_index() == 0:
        with storage.wrap_errors(f"--workdir={workdir} cannot be written"):
            storage.write_text(epath.Path(workdir) / "config.json", config.to_json(indent=2) + "\n")


class Checkpoints:
    """Checkpoints of a workdir, saved in the background. A context manager that waits for the last save."""

    def __init__(
        self, workdir: str, keep: int = 1, keep_every: Sequence[int] = (), read_only: bool = False, state: Any = None
    ):
        """Opens the checkpoints. `state` (arrays or shapes) bounds the memory of a save to a few per cent.

        The newest `keep` are kept. The averages at multiples of any step in `keep_every` are kept for ever.
        """
        self.path = folder(workdir)
        rules: list[policies.PreservationPolicy] = [policies.LatestN(keep), *map(policies.EveryNSteps, keep_every)]
        self._keep, self._thins = keep, bool(keep_every) and not read_only
        self._thinned: set[int] = set()
        self._started = 0.0
        self._step = -1
        self._unusable: set[int] = set()
        self._saving: dict[str, dict[str, tuple[int, ...]]] = {}  # item -> shapes of its arrays
        storage.check_arrays_path(self.path, write=not read_only)
        orbax_logging.suppress()

        def verify(item: str) -> checksums.Verify:
            return lambda directory: checksums.verify_arrays(directory, self._saving.get(item))

        def opened() -> ocp.CheckpointManager:
            arrays = {name: ocp.StandardCheckpointHandler(**_copy_limits(state)) for name in ARRAY_ITEMS}
            plain = {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")}
            return ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                    preservation_policy=policies.AnyPreservationPolicy(rules),
                    async_options=None if read_only else ocp.AsyncOptions(post_finalization_callback=self._saved),
                    enable_async_checkpointing=not read_only,
                ),
                item_handlers={name: checksums.with_checksums(x, verify(name)) for name, x in (arrays | plain).items()},
            )

        with self._errors("opened"):
            self._manager = storage.retry(opened)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._errors("written"):
            self._manager.close()

    @contextlib.contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (isinstance(error, (ValueError, RuntimeError)) or storage.is_error(error)):
                raise
            last = None
            with contextlib.suppress(Exception):  # Orbax's manager forgets a step before it removes it
                last = max(ocp.utils.checkpoint_steps(self.path), default=None)
            newest = f"step {last} is the last good one" if last is not None else "there is none yet"
            raise ConfigError(
                f"checkpoints in {self.path} cannot be {verb}; {newest}: {storage.cause_message(error)}."
            ) from error

    def _saved(self) -> None:
        if jax.process_index() == 0:
            seconds = time.monotonic() - self._started
            logging.info("saved step %d to %s (%.1f s, in the background)", self._step, self.path, seconds)
            self._thin()

    @property
    def last(self) -> int | None:
        """Newest complete step."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All complete steps in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: dict[str, Any], data: dict[str, Any] | None, meta: dict[str, Any]) -> None:
        """Starts a save, and returns as soon as the arrays may be overwritten. An existing step is kept.

        Args:
          step: Number of training steps done.
          arrays: Item of `ARRAY_ITEMS` -> tree.
          data: State of the data iterator, the same in every process.
          meta: JSON for readers of the checkpoint: data set, class names, tokenizer.

        Raises:
          ConfigError: This checkpoint or the previous one could not be written.
        """
        with self._errors("written"):
            self._manager.wait_until_finished()  # raises errors of the previous save
            if step in self._manager.all_steps():
                return
            self._started, self._step = time.monotonic(), step
            self._saving = {name: checksums.array_shapes(tree) for name, tree in arrays.items()}
            items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
            if data is not None:
                items["data"] = ocp.args.JsonSave(data)
            items["meta"] = ocp.args.JsonSave(meta)
            malloc.trim()  # memory that compiling has freed
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            malloc.trim()

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        with self._errors("written"):
            self._manager.wait_until_finished()

    def _thin(self) -> None:
        """Reduces old checkpoints that are kept for ever to the items that are evaluated, or tries again later."""
        if not self._thins:
            return
        for step in sorted({*self.steps[: -self._keep]} - self._thinned):
            try:
                for item in ("opt", "params", "data"):
                    (self.path / str(step) / item).rmtree(missing_ok=True)
            except Exception as error:
                if not storage.is_error(error):
                    raise
                logging.error("step %d could not be thinned to its averages: %s", step, storage.cause_message(error))
            else:
                self._thinned.add(step)  # saves requests to a bucket

    def check(self) -> None:
        """Raises ConfigError if a save in the background has failed."""
        with self._errors("written"):
            self._manager.check_for_errors()

    def restore(
        self, targets: dict[str, Any], data: bool = False, step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
        """Restores items of the newest intact checkpoint, or of `step`.

        Damaged checkpoints are logged and skipped: compare the step with `last`. Transient errors are
        retried.

        Args:
          targets: Item -> abstract tree with shardings.
          data: Whether to restore the state of the data iterator too.
          step: The only checkpoint to try; None for all, from the newest on.

        Returns:
          (step, item -> tree, data state or None).

        Raises:
          ConfigError: No checkpoint is intact or has the items, or storage fails.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise ConfigError(f"there is no checkpoint in {self.path}: train first, or give another --workdir.")
        if step is not None and step not in steps:
            known = ", ".join(str(s) for s in reversed(steps))
            raise ConfigError(f"there is no checkpoint of step {step} in {self.path}, only of {known}.")
        items: dict[str, Any] = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        if data:
            items["data"] = ocp.args.JsonRestore()
        problem = ""
        for candidate in steps if step is None else [step]:
            try:
                self._together(candidate, functools.partial(self._check, candidate, items))
                restored = self._together(candidate, functools.partial(self._read, candidate, items))
            except checksums.DamagedError as error:
                problem = str(error)
                logging.error("the checkpoint of step %d in %s cannot be used: %s", candidate, self.path, error)
                self._unusable.add(candidate)
                continue
            trees = {name: restored[name] for name in targets}
            return candidate, trees, restored["data"] if data else None
        raise ConfigError(f"no checkpoint in {self.path} can be restored: {problem}.")

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` of `save`.

        Raises:
          ConfigError: It is missing or damaged.
        """
        folder = self.path / str(step) / "meta"
        with storage.wrap_errors(f"{folder} cannot be read"):
            try:
                checksums.verify_files(folder)
            except checksums.DamagedError as error:
                raise ConfigError(f"{folder} is damaged: {error}.") from None
            content = storage.read_json_object(folder / "metadata")
        if content is None:
            raise ConfigError(f"{folder} is damaged: its metadata is missing.")
        return content

    def abstract_tree(self, item: str) -> Any:
        """Returns the tree of an item of the newest step, with shapes and types; None if the step lacks the item."""
        with self._errors("read"):
            tree = self._manager.item_metadata(self._manager.latest_step()).get(item)
        return None if tree is None else tree.tree

    def _together(self, step: int, act: Callable[[], T]) -> T:
        """Calls `act`, and raises DamagedError or ConfigError in all processes if it fails in any of them."""
        result: list[T] = []
        problem: Exception | None = None
        try:
            result = [act()]
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            problem = error
        grade = 0 if problem is None else 1 if isinstance(problem, checksums.DamagedError) else 2
        worst = int(np.max(multihost_utils.process_allgather(np.array(grade))))
        if worst == 0:
            return result[0]
        if worst == 1:
            raise problem or checksums.DamagedError("another process says why")
        cause = storage.cause_message(problem) if grade == 2 else "another process says why"
        wrong = "be read" if problem is None or storage.is_error(problem) else "be restored into this config's arrays"
        raise ConfigError(f"the checkpoint of step {step} in {self.path} cannot {wrong}: {cause}.") from problem

    def _check(self, step: int, items: dict[str, Any]) -> None:
        """Verifies the checksums of `items`, each process its share."""
        folder = self.path / str(step)
        present = {path.name for path in storage.retry(lambda: list(folder.iterdir()))}
        if missing := [name for name in items if name not in present]:
            others = [name for name in (*ARRAY_ITEMS, "data", "meta") if name in present]
            raise checksums.DamagedError(f"step {step} holds no {', '.join(missing)}, only {', '.join(others)}")
        share = jax.process_index(), jax.process_count()
        for name in {*items, "meta"} & present:
            checksums.verify_files(folder / name, *share)

    def _read(self, step: int, items: dict[str, Any]) -> Any:
        return storage.retry(lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))

    def drop_after(self, step: int) -> None:
        """Renames the damaged checkpoints after `step`, so that their steps can be saved again."""
        for newer in sorted(s for s in self._unusable if s > step):
            if jax.process_index() == 0:
                target = self.path / f"broken_{newer}"
                with storage.wrap_errors(f"{self.path} cannot be written"):
                    target.rmtree(missing_ok=True)
                    (self.path / str(newer)).rename(target)
                logging.warning("moved the checkpoint of step %d to %s", newer, target)
        sync("drop_after")
        self._manager.reload()


def _copy_limits(state: Any) -> dict[str, Any]:
    """Returns Orbax's limit on concurrent copies of an item: 1/32 of the state, but at least 1.5 times the largest array."""
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    return {"save_concurrent_gb": max(sum(sizes) / 32, 1.5 * max(sizes)) / 1e9} if sizes else {}


def exists(workdir: str) -> bool:
    """Returns whether the workdir has a finished checkpoint. JAX's devices are not initialized."""
    with storage.wrap_errors(f"--workdir={workdir} cannot be read"):
        path = folder(workdir)
        return path.exists() and bool(ocp.utils.checkpoint_steps(path))


def complete_steps(workdir: str) -> list[int]:
    """Returns the steps of a workdir's complete checkpoints in ascending order."""
    if not exists(workdir):
        return []
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.steps


def require(workdir: str) -> None:
    """Checks that a workdir has a checkpoint.

    Raises:
      ConfigError: It has none.
    """
    with storage.wrap_errors(f"--workdir={workdir} cannot be read"):
        if not epath.Path(workdir).exists():
            raise ConfigError(f"--workdir={workdir} does not exist: train first, or give another one.")
    if not exists(workdir):
        raise ConfigError(f"there is no checkpoint in {folder(workdir)}: train first, or give another --workdir.")
