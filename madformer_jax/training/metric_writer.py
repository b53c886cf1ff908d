"""The metrics of a training run: log lines, workdir/metrics.jsonl and the trackers of `train.log_to`.

`modes.train` adds the metrics of each step, and the hooks write their scores and pictures.
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage
from madformer_jax.sampling import generation
from madformer_jax.training import trackers
from madformer_jax.training.trackers import Tracker

MAX_LOGGED_IMAGES = 64  # training images that are shown
MAX_GRID_SIDE = 2048  # pixels; largest width and height of an image grid
MAX_PENDING_WRITES = 20  # beyond this many, training waits for a slow bucket


class DivergedError(ConfigError):
    """The loss or a gradient is no longer finite: the state is not worth saving."""


class MetricWriter:
    """Writes the metrics of a run to the log, to workdir/metrics.jsonl and to trackers.

    A thread writes the files in order, so a failed write is raised by a later call. metrics.jsonl
    has one line for each report, each set of scores and each validation. At the start, the lines of steps that will
    be trained again are removed.
    """

    def __init__(self, c: ConfigDict, workdir: str, step: int, cost: float, devices: int):
        """Opens metrics.jsonl at a step.

        Args:
          c: The config.
          workdir: Folder of the files.
          step: Number of the step that training continues from.
          cost: Floating-point operations of a step.
          devices: Number of devices in the mesh.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        self.figures: dict[str, Any] = {"step": step}
        self._steps, self._batch = c.train.steps, c.train.batch
        self._skip = c.optimizer.skip
        self._cost, self._peak = cost, devices * flops.peak_rate(c.model.dtype)
        self._workdir, self._path = workdir, epath.Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if self._writes:
            with storage.wrap_errors(f"{self._path} cannot be written"):
                self.figures |= _truncate_metrics(self._path, step)
        self._pending: list[tuple[int, dict[str, Any]]] = []  # (step, metrics), still on the device
        self._checked: list[tuple[int, dict[str, Any]]] = []
        self._warm, self._since, self._since_step = False, time.monotonic(), step
        self._config = c
        self._tracker_names = trackers.names(c) if self._writes else []  # without those that have failed
        self._trackers: dict[str, Tracker] = {}  # opened at their first write, in the thread
        self._thread = ThreadPoolExecutor(1, "report")
        self._queue: list[Future[None]] = []

    def log_start(self, step: int, parameters: int, images: np.ndarray | None) -> None:
        """Writes the config and training images to the trackers.

        Args:
          step: Number of the step.
          parameters: Number of parameters.
          images: uint8 (n, H, W, c), or None to log no images.
        """

        def write(tracker: Tracker) -> None:
            tracker.write_config(step, self._config)
            tracker.write_scalars(step, {"parameters": parameters})
            if images is not None:
                small = generation.downscale_for_grid(images[:MAX_LOGGED_IMAGES], MAX_GRID_SIDE)
                tracker.write_image(step, "training_images", generation.tile_grid(small))

        self._submit_to_trackers(write)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step, which may still be computed on the device.

        Args:
          step: Number of the step, or of the last step of a call with several (`train.scan`).
          metrics: Scalars, or arrays (K,) of K steps.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > 1:  # At most two steps in flight: a notice to stop is heard soon.
            jax.block_until_ready(self._pending[-2])
        if not self._warm:  # The first step includes compilation and is left out of the rates.
            jax.block_until_ready(metrics)
            self._warm, self._since, self._since_step = True, time.monotonic(), step

    def check_finite(self) -> None:
        """Checks the steps since the last check, and logs those that were skipped.

        Finite gradients keep a finite state finite, so the loss and the gradient norm suffice.

        Raises:
          DivergedError: The loss or the gradient of a step is not finite, and it was not skipped.
        """
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        for step, metrics in itertools.chain(*(unstack(step, m) for (step, _), m in zip(pending, fetched))):
            if 0 < (skipped := metrics.pop("skipped", 0)) <= self._skip:
                logging.warning("step %d: a gradient is not finite; skipped (%d in a row)", step, skipped)
                continue
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                raise DivergedError(
                    f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {step}: training has diverged. "
                    "Resume with a lower optimizer.learning_rate or optimizer.clip. Or start in another workdir with "
                    "optimizer.skip=3, which skips such steps"
                )
            self._checked.append((step, metrics))

    def write(self) -> None:
        """Checks the metrics since the last report and writes their means.

        Raises:
          DivergedError: See `check_finite`.
          ConfigError: metrics.jsonl cannot be written.
        """
        self.check_finite()
        if not self._checked:
            return
        step, mean = self._checked[-1][0], _mean_metrics([metrics for _, metrics in self._checked])
        # The rate is 0 if only the step that compiled was run.
        rate = (step - self._since_step) / (time.monotonic() - self._since)
        speed = {"steps_per_second": rate, "images_per_second": self._batch * rate}
        speed |= {"tflops": self._cost * rate / 1e12, "mfu": self._cost * rate / self._peak}
        self.figures = {"step": step} | mean | speed
        self._checked, self._since, self._since_step = [], time.monotonic(), step
        logging.info(
            "step %d/%d (%d %%)  loss %.4f%s  |g| %.2f  lr %.1e  %.2f steps/s  %.0f img/s  "
            "%.3g TFLOP/s  MFU %.0f %%  ETA %s",
            step, self._steps, 100 * step // self._steps, mean["loss"],
            "".join(f"  {n[5:]} {v:.4f}" for n, v in mean.items() if n.startswith("loss_")),
            mean["grad_norm"], mean["learning_rate"], rate, speed["images_per_second"],
            speed["tflops"], 100 * speed["mfu"],
            _format_duration((self._steps - step) / rate) if rate else "unknown",
        )  # fmt: skip
        self._append(self.figures)
        self._submit_to_trackers(lambda tracker: tracker.write_scalars(step, mean | speed))

    def write_scores(self, step: int, n: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the scores of a step's samples.

        Args:
          step: Number of the step, which `write` has reported.
          n: Number of samples.
          scores: "value", "low" and "high" of each score by its name.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        values = {name: score["value"] for name, score in scores.items()}
        parts = [f"{name} {s['value']:.4g} [{s['low']:.4g}, {s['high']:.4g}]" for name, s in scores.items()]
        logging.info("step %d, %d samples: %s", step, n, "  ".join(parts))
        self.figures = self.figures | {"scored": n} | values
        self._append({"step": step, "scored": n} | values)
        self._submit_to_trackers(lambda tracker: tracker.write_scalars(step, values))

    def write_validation(self, step: int, n: int, metrics: list[dict[str, Any]]) -> None:
        """Writes the mean losses on held-out images, with the prefix "validation_".

        Args:
          step: Number of the step.
          n: Number of images.
          metrics: Metrics of each batch.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        mean = {f"validation_{name}": value for name, value in _mean_metrics(metrics).items()}
        logging.info(
            "step %d, %d held-out images: %s",
            step, n, "  ".join(f"{name.removeprefix('validation_')} {value:.4f}" for name, value in mean.items()),
        )  # fmt: skip
        self.figures = self.figures | mean
        self._append({"step": step, "validated": n} | mean)
        self._submit_to_trackers(lambda tracker: tracker.write_scalars(step, mean))

    def _append(self, figures: dict[str, Any]) -> None:
        def append() -> None:
            with storage.wrap_errors(f"{self._path} cannot be written"):
                storage.append_line(self._path, json.dumps(figures))

        if self._writes:
            self._submit(append)

    def _submit(self, write: Callable[[], None]) -> None:
        """Queues a write, and raises the error of an earlier one."""
        self._queue.append(self._thread.submit(write))
        while self._queue and (self._queue[0].done() or len(self._queue) > MAX_PENDING_WRITES):
            self._queue.pop(0).result()

    def flush(self) -> None:
        """Waits until everything is written.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        while self._queue:
            self._queue.pop(0).result()

    def save_png(self, path: storage.Path, image: np.ndarray) -> None:
        """Writes a picture, uint8 (H, W, c), as a PNG. An error is logged and the run continues."""

        def write() -> None:
            try:
                generation.write_png(path, image)
            except Exception as error:
                logging.error("%s cannot be written: %s", path, storage.cause_message(error))

        if self._writes:
            self._submit(write)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 (H, W, c), to the trackers."""
        self._submit_to_trackers(lambda tracker: tracker.write_image(step, name, image))

    def _submit_to_trackers(self, write: Callable[[Tracker], None]) -> None:
        if self._tracker_names:
            self._submit(lambda: self._write_to_trackers(write))

    def _write_to_trackers(self, write: Callable[[Tracker], None]) -> None:
        """Writes to each tracker.

        The first error of a tracker is logged and ends all writing to it. metrics.jsonl still has
        the figures.
        """
        for name in list(self._tracker_names):
            kind = trackers.TRACKERS[name]
            try:
                if name not in self._trackers:
                    self._trackers[name] = kind(self._config, self._workdir)
                write(self._trackers[name])
            except Exception as error:  # Trackers and TensorFlow's file systems raise errors of their own.
                logging.error(
                    "%s: a write failed, so nothing more is written to it: %s", kind.title, storage.cause_message(error)
                )
                self._tracker_names.remove(name)

    @contextlib.contextmanager
    def pause_timer(self) -> Iterator[None]:
        """Leaves the time within the context out of the rates."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def close(self) -> None:
        """Writes what is queued and ends the thread.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        try:
            self.flush()
        finally:
            self._thread.shutdown()
            for name in self._tracker_names:
                if name in self._trackers:
                    self._trackers[name].close()


def _truncate_metrics(path: epath.Path, step: int) -> dict[str, Any]:
    """Removes the lines of metrics.jsonl after `step`, and half a line that a killed process left.

    Returns:
      The report of `step` with its scores; empty without one.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    remaining: list[str] = []
    report: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            figures = json.loads(line)
            if figures["step"] <= step:
                remaining.append(line)
                report |= figures if figures["step"] == step else {}
    if remaining != lines:
        storage.write_text(path, "".join(f"{line}\n" for line in remaining))
    return report


def unstack(step: int, metrics: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Returns the number and the metrics of each step, for arguments as of `MetricWriter.add`."""
    if not np.ndim(metrics["loss"]):
        return [(step, metrics)]
    count = len(metrics["loss"])
    return [(step - count + 1 + i, {name: values[i] for name, values in metrics.items()}) for i in range(count)]


def _mean_metrics(fetched: list[dict[str, Any]]) -> dict[str, float]:
    """Averages metrics over steps.

    The loss of a quarter of the timesteps is NaN for steps in which no block fell into it. They are
    left out of its mean.
    """
    values = {name: np.array([m[name] for m in fetched], np.float64) for name in fetched[0]}
    quarters = [name for name in values if name.startswith("loss_q")]
    for name in quarters:
        values[name] = values[name][~np.isnan(values[name])]
    return {name: float(v.mean()) for name, v in values.items() if len(v)}


def _format_duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
