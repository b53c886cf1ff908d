"""What a training does aside: sample grids, scores, losses on held-out images.

Whatever goes wrong with them, training goes on; unless it goes wrong in one of several processes alone.
"""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.data import pipeline
from madformer_jax.diffusion import losses
from madformer_jax.evaluation import sample_scores
from madformer_jax.runtime import partitioning, storage
from madformer_jax.sampling import generation, prompts
from madformer_jax.training import train_step
from madformer_jax.training.metric_writer import MAX_GRID_SIDE, MetricWriter

# What the seed's key is folded with to validate; training folds it with its step, images with 2^31 (`drawing.SAMPLE`).
VALIDATION_STREAM = (1 << 31) + 1


class TrainContext(NamedTuple):
    """What a training draws with, and tells it to."""

    setup: train_step.Setup
    draw: generation.SampleFn
    codec_params: Any  # empty where cached latents need none
    mesh: Mesh
    report: MetricWriter


class Hook(abc.ABC):
    """Something that is done with the weights of a step."""

    what: str

    def __init__(self, c: ConfigDict, studio: TrainContext):
        self._c, self._studio = c, studio

    def do(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        """Does it, and looks between its batches whether to `stop`. What goes wrong is told in one line: training goes on.

        Raises:
          whatever went wrong in this process and not in the others: they wait for it.
        """
        with self._studio.report.paused():
            try:
                self._do(step, state, stop)
            except _StopError:
                logging.info("asked to stop: the %s of step %d are left out", self.what, step)
            except Exception as error:
                logging.error("the %s of step %d are left out: %s", self.what, step, storage.cause_message(error))
                if not partitioning.all_failed():
                    raise

    @abc.abstractmethod
    def _do(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        """What it is."""

    def _weights(self, state: train_step.State) -> Any:
        return state.ema if self._c.sample.weights == "ema" else state.params

    def _codec_params(self) -> Any:
        mesh = self._studio.mesh
        return self._studio.codec_params or jax.device_put(
            self._studio.setup.codec.load(), partitioning.replicated(mesh)
        )


class _StopError(Exception):
    """The run is to save and leave."""


class Validation(Hook):
    """The losses on `train.validate_n` images of `evaluate.split`, always the same ones with the same noise."""

    what = "losses of validation"

    def __init__(self, c: ConfigDict, studio: TrainContext, share: int, shares: int):
        """share, shares: which part of a batch this process reads, of how many.

        Raises:
          ConfigError: the split does not open.
        """
        c = c.copy_and_resolve_references()
        c.data.split, c.data.flip, c.data.workers = c.evaluate.split, False, 0
        super().__init__(c, studio)
        self._share = {"batch": c.train.batch // shares, "process_index": share, "process_count": shares}
        pipeline.train_iterator(c, **self._share, validation=True)  # while an error costs nothing
        loss = train_step.make_loss(studio.setup, c, dropout=0.0)

        def measure(params: Any, batch: dict[str, Array], *rest: Any) -> tuple[dict[str, Array], Array | int]:
            lengths = batch.get("lengths")
            return loss(params, batch, *rest)[1], 0 if lengths is None else losses.count_predicted_tokens(lengths)

        # (params, batch, codec params, key) -> metrics, number of predicted tokens
        self._program = jax.jit(measure, out_shardings=partitioning.replicated(studio.mesh))

    def _do(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        c, mesh, weights, codec_params = self._c, self._studio.mesh, self._weights(state), self._codec_params()
        key = jax.random.fold_in(jax.random.key(c.seed), VALIDATION_STREAM)
        found: list[dict[str, Any]] = []
        counts: list[int] = []
        data = pipeline.train_iterator(c, **self._share, validation=True)
        with contextlib.closing(data):
            for i in range(math.ceil(c.train.validate_n / c.train.batch)):
                if stop():
                    raise _StopError
                batch = partitioning.global_batch(next(data), mesh)
                measured = self._program(weights, batch, codec_params, jax.random.fold_in(key, i))
                metrics, count = jax.device_get(measured)
                found.append(metrics)
                counts.append(count)
        self._studio.report.validate(step, len(found) * c.train.batch, _average_text_loss(found, counts, c.loss.text))


def _average_text_loss(found: list[dict[str, Any]], counts: Sequence[int], weight: float) -> list[dict[str, Any]]:
    """Replaces the text term of each batch by that over the tokens of all batches, in the loss too.

    Args:
      found: Metrics of each batch.
      counts: Number of predicted tokens of each batch, 0 without captions.
      weight: Weight of the text term in the loss.
    """
    if "loss_text" not in found[0]:
        return found
    total = np.dot([float(m["loss_text"]) for m in found], counts) / max(1, np.sum(counts))
    return [m | {"loss_text": total, "loss": m["loss"] + weight * (total - m["loss_text"])} for m in found]


class SamplingHook(Hook):
    """Something with the first `sample.n` images of a config, which must have room for them in `sample.noise`."""

    def __init__(self, c: ConfigDict, studio: TrainContext, n: int):
        super().__init__(c, studio)
        self._n = n
        generation.open_noise(c), prompts.tokenize(c)  # while an error in them costs nothing

    def _do(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        self._use(step, self._batches(state, stop))

    def _batches(self, state: train_step.State, stop: Callable[[], bool]) -> Iterator[generation.SampleBatch]:
        c, mesh, n, drawn = self._c, self._studio.mesh, self._n, 0
        weights, codec_params = self._weights(state), self._codec_params()
        for batch in generation.batches(c, self._studio.draw, weights, codec_params, mesh, range(n), most=n):
            yield batch
            drawn += len(batch.images)
            if drawn < n and stop():
                raise _StopError

    @abc.abstractmethod
    def _use(self, step: int, batches: Iterator[generation.SampleBatch]) -> None:
        """Takes the images in as they are drawn."""


class SampleGrid(SamplingHook):
    """Side by side, scaled down to `GRID`, to workdir/samples/step_..._{ema,raw}.png and TensorBoard."""

    what = "samples"

    def __init__(self, c: ConfigDict, studio: TrainContext, workdir: str):
        super().__init__(c, studio, min(c.sample.n, c.sample.grid))
        self._folder = epath.Path(workdir) / "samples"

    def _use(self, step: int, batches: Iterator[generation.SampleBatch]) -> None:
        weights = self._c.sample.weights
        images = generation.downscale_for_grid(np.concatenate([batch.images for batch in batches]), MAX_GRID_SIDE)
        canvas = generation.tile_grid(prompts.add_caption_strips(images, prompts.load(self._c)[: len(images)]))
        path = self._folder / f"step_{step:06d}_{weights}.png"
        logging.info("drew %d samples with the %s weights: %s", self._n, weights, path)
        self._studio.report.keep(path, canvas)
        self._studio.report.show(step, f"samples_{weights}", canvas)


class Scores(SamplingHook):
    """The scores of `train.evaluate_n` images, to the log, workdir/metrics.jsonl and TensorBoard."""

    what = "scores"

    def __init__(self, c: ConfigDict, studio: TrainContext, judge: sample_scores.Judge):
        c = c.copy_and_resolve_references()
        c.sample.n = c.train.evaluate_n
        super().__init__(c, studio, c.sample.n)
        self._judge = judge

    def _use(self, step: int, batches: Iterator[generation.SampleBatch]) -> None:
        found = sample_scores.extract_features(batches, self._judge.extract, self._judge.attribute_classifier)
        labeled = bool(self._c.model.classes)
        self._studio.report.score(
            step, self._n, sample_scores.compute_scores(self._c, self._judge, found, labeled=labeled)
        )
