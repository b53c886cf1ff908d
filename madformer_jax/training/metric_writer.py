"""What a training run tells of its steps."""

import contextlib
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

MAX_LOGGED_IMAGES = 64  # training images in TensorBoard
MAX_GRID_SIDE = 2048  # pixels: the most a grid of images is wide and high, in TensorBoard and in a training's samples
MAX_PENDING_WRITES = 20  # writings that may wait for a slow bucket; then the training does


class DivergedError(ConfigError):
    """The loss or a gradient is no longer finite: the state is not worth saving."""


class MetricWriter:
    """What a run tells of its steps: lines in the log and in workdir/metrics.jsonl, and TensorBoard's files.

    Files are written by a thread, one after the other: what cannot be written is raised by a later call. metrics.jsonl tells
    each step once, and its scores once, in a line of their own: what it says of steps that are done again is taken out at the
    start.
    """

    def __init__(self, c: ConfigDict, workdir: str, step: int, cost: float, devices: int):
        """cost: floating-point operations of a step."""
        self.figures: dict[str, Any] = {"step": step}
        self._steps, self._batch = c.train.steps, c.train.batch
        self._skip = c.optimizer.skip
        self._cost, self._peak = cost, devices * flops.peak_rate(c.model.dtype)
        self._workdir, self._path = workdir, epath.Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if self._writes:
            with storage.wrap_errors(f"{self._path} cannot be written"):
                self.figures |= _truncate_metrics(self._path, step)
        self._pending: list[tuple[int, dict[str, Any]]] = []  # on the device
        self._checked: list[tuple[int, dict[str, Any]]] = []
        self._warm, self._since, self._since_step = False, time.monotonic(), step
        self._board: Any = None
        self._shows = self._writes
        self._thread = ThreadPoolExecutor(1, "report")
        self._queue: list[Future[None]] = []

    def begin(self, step: int, c: ConfigDict, parameters: int, images: np.ndarray | None) -> None:
        """Tells TensorBoard what trains: the config, the number of parameters, and images uint8 (n, H, W, c)."""

        def write(board: Any) -> None:
            board.write_texts(step, {"config": f"```json\n{c.to_json(indent=2)}\n```"})
            board.write_scalars(step, {"parameters": parameters})
            if images is not None:
                board.write_images(
                    step,
                    {
                        "training_images": generation.tile_grid(
                            generation.downscale_for_grid(images[:MAX_LOGGED_IMAGES], MAX_GRID_SIDE)
                        )[None]
                    },
                )

        self._show(write)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes in the metrics of one more step, as they come from the device."""
        self._pending.append((step, metrics))
        if len(self._pending) > 1:  # at most two steps in flight: a notice to stop is heard, and no queue grows
            jax.block_until_ready(self._pending[-2])
        if not self._warm:  # the first step compiled; it is left out of the rates
            jax.block_until_ready(metrics)
            self._warm, self._since, self._since_step = True, time.monotonic(), step

    def check(self) -> None:
        """Tells of skipped steps; finite gradients keep a finite state finite.

        Raises:
          DivergedError: a step since the last check was not finite, and not skipped.
        """
        pending, self._pending = self._pending, []
        for (step, _), metrics in zip(pending, jax.device_get([metrics for _, metrics in pending])):
            if 0 < (skipped := metrics.pop("skipped", 0)) <= self._skip:
                logging.warning("step %d: a gradient is not finite; skipped (%d in a row)", step, skipped)
                continue
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                raise DivergedError(
                    f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {step}: training has diverged. "
                    "Go on with a lower optimizer.learning_rate or optimizer.clip; in another workdir, optimizer.skip=3 bears such "
                    "steps"
                )
            self._checked.append((step, metrics))

    def write(self) -> None:
        """Reports the means since the last report; checks them first.

        Raises:
          ConfigError: metrics.jsonl cannot be written, or as `check`.
        """
        self.check()
        if not self._checked:
            return
        step, mean = self._checked[-1][0], _mean_metrics([metrics for _, metrics in self._checked])
        rate = (step - self._since_step) / (
            time.monotonic() - self._since
        )  # 0 where only the step that compiled was run
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
        self._show(lambda board: board.write_scalars(step, mean | speed))

    def score(self, step: int, n: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Reports the scores of n samples of a step that `write` has told of: value, low, high by name.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        values = {name: score["value"] for name, score in scores.items()}
        told = [f"{name} {s['value']:.4g} [{s['low']:.4g}, {s['high']:.4g}]" for name, s in scores.items()]
        logging.info("step %d, %d samples: %s", step, n, "  ".join(told))
        self.figures = self.figures | {"scored": n} | values
        self._append({"step": step, "scored": n} | values)
        self._show(lambda board: board.write_scalars(step, values))

    def validate(self, step: int, n: int, metrics: list[dict[str, Any]]) -> None:
        """Reports the mean losses on n held-out images, by the names of the training's behind "validation_".

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
        self._show(lambda board: board.write_scalars(step, mean))

    def _append(self, figures: dict[str, Any]) -> None:
        def append() -> None:
            with storage.wrap_errors(f"{self._path} cannot be written"):
                storage.append_line(self._path, json.dumps(figures))

        if self._writes:
            self._later(append)

    def _later(self, act: Callable[[], None]) -> None:
        self._queue.append(self._thread.submit(act))
        while self._queue and (self._queue[0].done() or len(self._queue) > MAX_PENDING_WRITES):
            self._queue.pop(0).result()

    def settle(self) -> None:
        """Until all is written.

        Raises:
          ConfigError: metrics.jsonl cannot be.
        """
        while self._queue:
            self._queue.pop(0).result()

    def keep(self, path: storage.Path, image: np.ndarray) -> None:
        """Writes a picture, uint8 (H, W, c), as a PNG; where that fails, it is told, and the run goes on."""

        def write() -> None:
            try:
                generation.write_png(path, image)
            except Exception as error:
                logging.error("%s cannot be written: %s", path, storage.cause_message(error))

        if self._writes:
            self._later(write)

    def show(self, step: int, name: str, image: np.ndarray) -> None:
        """Puts a picture, uint8 (H, W, c), into TensorBoard."""
        self._show(lambda board: board.write_images(step, {name: image[None]}))

    def _show(self, write: Callable[[Any], None]) -> None:
        if self._shows:
            self._later(lambda: self._to_board(write))

    def _to_board(self, write: Callable[[Any], None]) -> None:
        """TensorBoard is not worth a run: what goes wrong there is told once, and metrics.jsonl has the figures."""
        if not self._shows:
            return
        try:
            if self._board is None:
                from clu import metric_writers  # which loads TensorFlow: four seconds, in the one process that writes

                self._board = metric_writers.create_default_writer(self._workdir)
            write(self._board)
            self._board.flush()  # a process that is killed leaves its last report too
        except Exception as error:  # TensorFlow's file systems each raise their own
            logging.error("TensorBoard gets nothing more from here on: %s", storage.cause_message(error))
            self._shows = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not the training's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def close(self) -> None:
        """Raises as `settle`."""
        try:
            self.settle()
        finally:
            self._thread.shutdown()
            if self._shows and self._board is not None:
                self._board.close()


def _truncate_metrics(path: epath.Path, step: int) -> dict[str, Any]:
    """Takes out the lines of metrics.jsonl behind `step`, and half a line that a killed process left.

    Returns:
      The report of `step`, where there is one, with its scores.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    kept: list[str] = []
    told: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            figures = json.loads(line)
            if figures["step"] <= step:
                kept.append(line)
                told |= figures if figures["step"] == step else {}
    if kept != lines:
        storage.write_text(path, "".join(f"{line}\n" for line in kept))
    return told


def _mean_metrics(fetched: list[dict[str, Any]]) -> dict[str, float]:
    """Means over steps; a quarter of the timesteps that no block fell into counts for nothing."""
    values = {name: np.array([m[name] for m in fetched], np.float64) for name in fetched[0]}
    quarters = [name for name in values if name.startswith("loss_q")]
    for name in quarters:
        values[name] = values[name][~np.isnan(values[name])]
    return {name: float(v.mean()) for name, v in values.items() if len(v)}


def _format_duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
