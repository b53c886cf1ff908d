"""What a training does aside: grids of samples, and their scores. Whatever goes wrong with them, training goes on."""

import abc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax import drawing, prompts, training
from madformer_jax.evaluation import samples
from madformer_jax.report import Report
from madformer_jax.runtime import partitioning, storage


class Studio(NamedTuple):
    """What a training draws with, and tells it to."""

    setup: training.Setup
    draw: drawing.Draw
    codec_params: Any  # empty where cached latents need none
    mesh: Mesh
    report: Report


class Aside(abc.ABC):
    """Something with the first `sample.n` images of a config, which must have room for them in `sample.noise`."""

    what: str

    def __init__(self, c: ConfigDict, studio: Studio, n: int):
        self._c, self._studio, self._n = c, studio, n
        drawing.given_noise(c), prompts.texts(c)  # while an error in them costs nothing

    def draw(self, step: int, state: training.State, stop: Callable[[], bool]) -> None:
        """Draws in batches and looks between them whether to `stop`. Whatever goes wrong is told in one line: training goes on."""
        with self._studio.report.paused():
            try:
                self._use(step, self._batches(state, stop))
            except _StopError:
                logging.info("asked to stop: the %s of step %d are left out", self.what, step)
            except Exception as error:
                logging.error("the %s of step %d are left out: %s", self.what, step, storage.cause(error))

    def _batches(self, state: training.State, stop: Callable[[], bool]) -> Iterator[drawing.Drawn]:
        c, mesh, n, drawn = self._c, self._studio.mesh, self._n, 0
        weights = state.ema if c.sample.weights == "ema" else state.params
        codec_params = self._studio.codec_params or jax.device_put(
            self._studio.setup.codec.load(), partitioning.replicated(mesh)
        )
        for batch in drawing.batches(c, self._studio.draw, weights, codec_params, mesh, range(n), most=n):
            yield batch
            drawn += len(batch.images)
            if drawn < n and stop():
                raise _StopError

    @abc.abstractmethod
    def _use(self, step: int, batches: Iterator[drawing.Drawn]) -> None:
        """Takes the images in as they are drawn."""


class _StopError(Exception):
    """The run is to save and leave."""


class Grid(Aside):
    """Side by side, to workdir/samples/step_..._{ema,raw}.png and TensorBoard."""

    what = "samples"

    def __init__(self, c: ConfigDict, studio: Studio, workdir: str):
        super().__init__(c, studio, min(c.sample.n, c.sample.grid))
        self._folder = epath.Path(workdir) / "samples"

    def _use(self, step: int, batches: Iterator[drawing.Drawn]) -> None:
        weights = self._c.sample.weights
        images = np.concatenate([batch.images for batch in batches])
        canvas = drawing.as_grid(prompts.below(images, prompts.of(self._c)[: len(images)]))
        path = self._folder / f"step_{step:06d}_{weights}.png"
        if jax.process_index() == 0:
            drawing.write_png(path, canvas)
        logging.info("drew %d samples with the %s weights: %s", self._n, weights, path)
        self._studio.report.show(step, f"samples_{weights}", canvas)


class Scores(Aside):
    """The scores of `train.evaluate_n` images, to the log, workdir/metrics.jsonl and TensorBoard."""

    what = "scores"

    def __init__(self, c: ConfigDict, studio: Studio, judge: samples.Judge):
        c = c.copy_and_resolve_references()
        c.sample.n = c.train.evaluate_n
        super().__init__(c, studio, c.sample.n)
        self._judge = judge

    def _use(self, step: int, batches: Iterator[drawing.Drawn]) -> None:
        found = samples.look(batches, self._judge.extract, self._judge.reader)
        labelled = bool(self._c.model.classes)
        self._studio.report.score(step, self._n, samples.scores(self._c, self._judge, found, labelled=labelled))
