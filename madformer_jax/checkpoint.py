"""Checkpoints: the training state and the data iterator's in one atomic, asynchronous Orbax checkpoint.

A workdir holds config.json and checkpoints/<step>/ with the items params, ema, optimizer (arrays) and data (JSON). An
export or a converted model is a workdir whose one checkpoint has params or ema alone.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import ConfigError

ARRAYS = ("params", "ema", "optimizer")

# What may change between two runs on one workdir; everything else decides what is learnt.
_FREE = (
    "platform",
    "compilation_cache",
    "profile",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.path",
    "data.workers",
    "codec.path",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_every",
    "sample",
    "mesh",
    "prepare",
    "convert",
    "benchmark",
    "compile",
)
_MODEL = ("model", "codec", "data.image_size", "data.channels")  # what weights depend on


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _within(field: str, parts: tuple[str, ...]) -> bool:
    return any(field == part or field.startswith(part + ".") for part in parts)


def saved_config(workdir: str) -> dict[str, Any] | None:
    """The config stored in a workdir, as a dict, or None.

    Raises:
      ConfigError: the file is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ConfigError(f"{path} is damaged: restore it, or start with a new --workdir.") from None


def claim(workdir: str, config: ConfigDict, *, write: bool) -> None:
    """Checks that a workdir belongs to this config and, for training, stores the config there.

    Raises:
      ConfigError: the workdir was made by an incompatible config (the fields are named), or cannot be written.
    """
    old, new = saved_config(workdir), json.loads(config.to_json_best_effort())
    if old is not None:
        was, now = _flat(old), _flat(new)
        matters = [f for f in now if f in was and (not _within(f, _FREE) if write else _within(f, _MODEL))]
        differing = [
            f"{f}={was[f]!r} (now {now[f]!r})" for f in matters if was[f] != now[f] and not _within(f, _FREE)
        ]
        if differing:
            raise ConfigError(
                f"{workdir} was made by another config: {', '.join(differing)}. Set these back or use a new --workdir."
            )
    if write:
        try:
            folder = epath.Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / ".config.json.part"
            part.write_text(json.dumps(new, indent=2) + "\n")
            part.replace(folder / "config.json")
        except OSError as error:
            raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror or error}.") from None


class Checkpoints:
    """The checkpoints of a workdir."""

    def __init__(self, workdir: str, *, keep: int = 1, keep_every: int = 0):
        self.folder = epath.Path(workdir).absolute() if "://" not in workdir else epath.Path(workdir)
        self.folder = self.folder / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, create=False, enable_async_checkpointing=True
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers["data"] = ocp.JsonCheckpointHandler()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def items(self, step: int) -> set[str]:
        """Names of the items that checkpoint `step` has."""
        return {path.name for path in (self.folder / str(step)).iterdir() if path.is_dir()}

    def save(self, step: int, data: Mapping[str, Any] | None = None, **arrays: Any) -> None:
        """Starts to save; a step that is saved already is left as it is.

        Raises:
          ConfigError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        if step in self._manager.all_steps():
            return
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        if data is not None:
            args["data"] = ocp.args.JsonSave(dict(data))
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          ConfigError: as `save`, for what went wrong in the background.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ConfigError:
        reason = str(error).strip().split("\n")[0]
        return ConfigError(
            f"saving to {self.folder} failed ({reason}): free space or mend the folder and run the same command again; "
            f"the newest complete checkpoint is step {self.latest}."
        )

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Items of checkpoint `step`: arrays into abstract targets, which carry today's shardings; `data=None` as JSON.

        Raises:
          ConfigError: the checkpoint lacks an item, is damaged or does not fit the targets.
        """
        lacking = [name for name in targets if name not in self.items(step)]
        if lacking:
            raise ConfigError(f"{self.folder / str(step)} holds no {', '.join(lacking)}, only what is needed to sample.")
        args = {
            name: ocp.args.JsonRestore() if name == "data" else ocp.args.StandardRestore(target)
            for name, target in targets.items()
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises many kinds for a file that is cut off or does not fit
            reason = str(error).strip().split("\n")[0][:300]
            raise ConfigError(f"checkpoint {self.folder / str(step)} cannot be read ({reason}).") from error
        return {name: restored[name] for name in targets}

    def restore_latest(self, **targets: Any) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its step; older ones stand in for damaged ones. None: there is none.

        Raises:
          ConfigError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, self.restore(step, **targets)
            except ConfigError as error:
                if step == steps[-1]:
                    raise
                logging.error("%s Going back to the checkpoint before it.", error)
                self._manager.delete(step)
        return None

    def close(self) -> None:
        self._manager.close()


def existing(workdir: str) -> Checkpoints:
    """The checkpoints of a workdir that must have some.

    Raises:
      ConfigError: there is no checkpoint.
    """
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise ConfigError(f"no checkpoint in --workdir={workdir}: train there first (--mode=train) or name another.")
    checkpoints = Checkpoints(workdir)
    if checkpoints.latest is None:
        checkpoints.close()
        raise ConfigError(f"no checkpoint in --workdir={workdir}: train there first (--mode=train) or name another.")
    return checkpoints


def write_model(workdir: str, config: ConfigDict, step: int, **arrays: Any) -> None:
    """Makes a workdir that holds a model to sample from: `params` or `ema`, and its config.

    Raises:
      ConfigError: the workdir holds a model already, or cannot be written.
    """
    if pathlib.Path(workdir, "checkpoints").exists():
        raise ConfigError(f"--workdir={workdir} holds checkpoints already: name a new folder.")
    claim(workdir, config, write=True)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(step, **arrays)
    checkpoints.wait()
    checkpoints.close()
