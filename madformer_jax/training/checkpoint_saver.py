"""Saving of checkpoints during training, also when an error ends it.

`modes.train` opens a `CheckpointSaver` around its loop. `runtime.checkpoint` has the format.
"""

from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.runtime import checkpoint, storage
from madformer_jax.training import train_step
from madformer_jax.training.metric_writer import DivergedError, MetricWriter


class CheckpointSaver:
    """Saves the state of the last finished step, when called and when an error ends the loop.

    A context manager around the loop. The loop sets `last_finished` = (step, state, position of
    the data) after each step.
    """

    def __init__(
        self,
        c: ConfigDict,
        workdir: str,
        checkpoints: checkpoint.Checkpoints,
        metric_writer: MetricWriter,
        data_identity: dict[str, Any],
        check_lock: Callable[[], None],
    ):
        """Initializes the saver.

        Args:
          c: The config.
          workdir: Folder of the run.
          checkpoints: The checkpoints of the workdir.
          metric_writer: The writer, which is flushed before each save.
          data_identity: Identity of the data and the tokenizer, saved with each checkpoint.
          check_lock: Raises if another process has taken over the workdir.
        """
        self.last_finished: tuple[int, train_step.State, dict[str, Any]] | None = None
        self._c, self._workdir, self._checkpoints = c, workdir, checkpoints
        self._metric_writer, self._data_identity, self._check_lock = metric_writer, data_identity, check_lock

    def __call__(self) -> None:
        """Writes the metrics and starts a save of the last finished step.

        Raises:
          DivergedError: The state is not finite; it is not saved.
        """
        self._metric_writer.write()
        self._metric_writer.flush()  # The metrics of a checkpoint must be on disk before it.
        self._save()

    def _save(self) -> None:
        assert self.last_finished is not None  # The loop has run a step.
        step, state, position = self.last_finished
        self._check_lock()
        checkpoint.write_config(self._c, self._workdir)  # A config is saved only after it worked.
        arrays = checkpoint.array_items(state)
        self._checkpoints.save(step, arrays, position, {"step": step, **self._data_identity})

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        self._checkpoints.wait()

    def diverged(self, error: DivergedError) -> ConfigError:
        """Returns the error of a run that has diverged, with its last good checkpoint."""
        self.wait()
        last = self._checkpoints.last
        good = f"step {last} of {self._workdir}" if last is not None else "none yet"
        return ConfigError(f"{error}; the last good checkpoint: {good}.")

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, DivergedError):
            raise self.diverged(error) from None
        # All processes save together, and the others do not know of the error in this one.
        if not isinstance(error, Exception) or self.last_finished is None or jax.process_count() > 1:
            return
        step = self.last_finished[0]
        try:
            self._metric_writer.check_finite()
            self._save()
            self.wait()
        except Exception as problem:
            logging.error("step %d could not be saved: %s", step, storage.cause_message(problem))
        else:
            logging.info("step %d, the last before an error, is saved", step)
