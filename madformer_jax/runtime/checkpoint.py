"""Checkpoints of a run: parameters, EMA, optimizer and data iterator in one atomic Orbax step.

A workdir holds `config.json` and `checkpoints/<step>/` with the items `params`, `ema`, `opt`, `data` and `meta`.
Sampling reads one item of it; `--mode=export` writes a workdir that holds `ema` and `meta` alone. Arrays are restored
into abstract targets that carry today's shardings, never those of the file: any mesh and any number of processes do.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import malloc
from madformer_jax.runtime.partitioning import sync

ARRAYS = ("params", "ema", "opt")

# What may differ when a run goes on; every other field of these sections must stay as it was.
_FIXED_SECTIONS = ("model", "loss", "codec", "data", "train", "optimizer")
_FREE = {
    "model.attention", "model.remat", "model.scan_unroll",  # how, not what, is computed
    "codec.path", "data.path", "data.workers",  # where the same weights and images lie today
    "train.log_every", "train.sample_every", "train.checkpoint_every", "train.keep", "train.keep_every",
}  # fmt: skip


def folder(workdir: str) -> epath.Path:
    return epath.Path(workdir).absolute() / "checkpoints"


def _flat(c: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in c.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def stored_config(workdir: str) -> dict[str, Any] | None:
    """The config that the workdir was made with, as nested plain values; None for a fresh one."""
    path = epath.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}).") from None


def check_config(config: ConfigDict, workdir: str, sections: tuple[str, ...] = ("seed", *_FIXED_SECTIONS)) -> None:
    """Compares a config with that of the workdir, where there is one. Fields that only one of them has are passed over.

    Raises:
      ConfigError: names the fields of `sections` that differ, with both values.
    """
    stored = stored_config(workdir)
    if stored is None:
        return
    before, now = _flat(stored), _flat(json.loads(config.to_json()))
    different = [
        f"config.{name} was {before[name]!r} and is {now[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if name.split(".")[0] in sections and name not in _FREE and before[name] != now[name]
    ]
    if different:
        raise ConfigError(f"{workdir} was made by another config: {'; '.join(different)}. Use another --workdir.")


def write_config(config: ConfigDict, workdir: str) -> None:
    """Makes the workdir and writes `config.json` into it, once for all processes.

    Raises:
      ConfigError: the workdir cannot be written.
    """
    try:
        path = epath.Path(workdir)
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            part = path / "config.json.part"
            part.write_text(config.to_json(indent=2) + "\n")
            part.replace(path / "config.json")  # never half a file, whenever the process dies
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror or first_line(error)}.") from None


class Checkpoints:
    """The checkpoints of one workdir, saved in the background; a context manager that waits for the last one."""

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0, read_only: bool = False, state: Any = None):
        """State: the arrays that will be saved, or their shapes; what is being written of them is then held to a few per cent."""
        self.path = folder(workdir)
        rules: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_every:
            rules.append(policies.EveryNSteps(keep_every))
        self._started = 0.0
        self._step = -1
        with self._errors("opened"):
            self._manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                    preservation_policy=policies.AnyPreservationPolicy(rules),
                    async_options=None if read_only else ocp.AsyncOptions(post_finalization_callback=self._saved),
                    enable_async_checkpointing=not read_only,
                ),
                item_handlers={
                    **{name: ocp.StandardCheckpointHandler(**_in_flight(state)) for name in ARRAYS},
                    "data": ocp.JsonCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._errors("written"):
            self._manager.close()

    @contextlib.contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            last = self._manager.latest_step() if hasattr(self, "_manager") else None
            kept = f"step {last} is the last good one" if last is not None else "there is none yet"
            raise ConfigError(f"checkpoints in {self.path} cannot be {verb}; {kept}: {_cause(error)}") from error

    def _saved(self) -> None:
        if jax.process_index() == 0:
            seconds = time.monotonic() - self._started
            logging.info("saved step %d to %s (%.1f s, in the background)", self._step, self.path, seconds)

    @property
    def last(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: dict[str, Any], data: dict[str, Any] | None, meta: dict[str, Any]) -> None:
        """Starts to save; returns as soon as the arrays may be overwritten. A step that is there is left alone.

        Args:
          step: steps done.
          arrays: trees by item name, of `ARRAYS`.
          data: the data iterator's state, the same in every process.
          meta: what a reader should know: plain values.

        Raises:
          ConfigError: this checkpoint or the one before could not be written (a full disk, say).
        """
        with self._errors("written"):
            self._manager.wait_until_finished()  # also raises what went wrong in the background
            if step in self._manager.all_steps():
                return
            self._started, self._step = time.monotonic(), step
            items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
            if data is not None:
                items["data"] = ocp.args.JsonSave(data)
            items["meta"] = ocp.args.JsonSave(meta)
            malloc.trim()  # what compiling has left
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            malloc.trim()

    def wait(self) -> None:
        """Until the last save is on disk."""
        with self._errors("written"):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises ConfigError where a save in the background has failed."""
        with self._errors("written"):
            self._manager.check_for_errors()

    def restore(
        self, targets: dict[str, Any], data: bool = False, step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
        """Restores items of the newest checkpoint that is complete, or of `step`.

        Args:
          targets: abstract trees with shardings, by item name.
          data: whether to read the data iterator's state too.
          step: the only checkpoint to try; by default all, from the newest on.

        Returns:
          (step, trees by item name, data state or None).

        Raises:
          ConfigError: there is no checkpoint, none is complete, or none has the item.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not steps:
            raise ConfigError(f"there is no checkpoint in {self.path}: train first, or give another --workdir.")
        problem: Exception | None = None
        for candidate in steps:
            items: dict[str, Any] = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
            if data:
                items["data"] = ocp.args.JsonRestore()
            restored = None
            try:
                self._require(candidate, items)
                restored = self._manager.restore(candidate, args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own
                problem = error
            if _everywhere(restored is not None):
                assert restored is not None
                trees = {name: restored[name] for name in targets}
                return candidate, trees, restored["data"] if data else None
            logging.error("the checkpoint of step %d in %s is not complete: %s", candidate, self.path, _cause(problem))
        raise ConfigError(f"no checkpoint in {self.path} can be restored: {_cause(problem)}") from problem

    def _require(self, step: int, items: dict[str, Any]) -> None:
        there = {path.name for path in (self.path / str(step)).iterdir()}
        missing = [name for name in items if name not in there]
        if missing:
            found = [name for name in (*ARRAYS, "data", "meta") if name in there]
            raise ConfigError(f"step {step} holds no {', '.join(missing)}, only {', '.join(found)}.")

    def drop_after(self, step: int) -> None:
        """Moves checkpoints newer than `step`, those that did not restore, out of the way."""
        for newer in [s for s in self._manager.all_steps() if s > step]:
            if jax.process_index() == 0:
                aside = self.path / f"broken_{newer}"
                if aside.exists():
                    aside.rmtree()
                (self.path / str(newer)).rename(aside)
                logging.warning("moved the incomplete checkpoint of step %d to %s", newer, aside)
        sync("drop_after")
        self._manager.reload()


def _in_flight(state: Any) -> dict[str, Any]:
    """Orbax's limit on what one item copies at a time while it is written: 1/32 of the state, but any array as a whole."""
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    return {"save_concurrent_gb": max(sum(sizes) / 32, 1.5 * max(sizes)) / 1e9} if sizes else {}


def _cause(error: Exception | None) -> str:
    """The line of an error that tells most: that of the system, where there is one."""
    text = str(error)
    system = (
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
        "Permission denied",
        "Read-only file system",
    )
    for words in system:
        if words in text:
            return f"{words}."
    return first_line(error)[:300] if error else "unknown"


def _everywhere(ok: bool) -> bool:
    """Whether `ok` holds in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def exists(workdir: str) -> bool:
    """Whether the workdir has a checkpoint, without touching JAX's devices."""
    path = folder(workdir)
    return path.exists() and any(child.name.isdigit() for child in path.iterdir())


def require(workdir: str) -> None:
    """Raises ConfigError where a workdir has no checkpoint."""
    if not epath.Path(workdir).exists():
        raise ConfigError(f"--workdir={workdir} does not exist: train first, or give another one.")
    if not exists(workdir):
        raise ConfigError(f"there is no checkpoint in {folder(workdir)}: train first, or give another --workdir.")


class Preemption:
    """Notice that the machine is about to be taken away: SIGTERM, or the cluster's through JAX's sync point.

    A context manager; `reached(step)` says, in all processes at the same step, that it is time to save and leave.
    """

    def __init__(self) -> None:
        self._noticed = threading.Event()
        # With several processes, JAX's own notifier takes the signal and tells the others.
        self._alone = jax.process_count() == 1
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed.set()

    def __exit__(self, *_: Any) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        return self._noticed.is_set() if self._alone else multihost_utils.reached_preemption_sync_point(step)
