"""Hooks of a training run: sample grids, scores and losses on held-out images.

`modes.train` makes the hooks of its config and calls `Hook.run` between steps. An error in a hook
is logged and training continues, unless it occurs in some of several processes only. To add a hook,
derive from `Hook`, or from `SamplingHook` if it needs images, and make it in `modes.train`.
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

from madformer_jax.config import seeds
from madformer_jax.data import pipeline
from madformer_jax.diffusion import losses
from madformer_jax.evaluation import sample_scores
from madformer_jax.evaluation.judge import Judge
from madformer_jax.runtime import partitioning, storage
from madformer_jax.sampling import generation, prompts
from madformer_jax.training import train_step
from madformer_jax.training.metric_writer import MAX_GRID_SIDE, MetricWriter

# Folded into the seed's key for validation. Training folds in its step, which is below 2^31, and
# sampling folds in 2^31 (`generation.SAMPLE_STREAM`).
VALIDATION_STREAM = (1 << 31) + 1


class TrainContext(NamedTuple):
    """Resources that hooks share: sampling program, codec weights, mesh and metric writer."""

    setup: train_step.Setup
    sample_fn: generation.SampleFn
    codec_params: Any  # empty if training on cached latents needs none
    mesh: Mesh
    metric_writer: MetricWriter
    guide_params: Any = None  # of the model of `sample.guide`, if it draws too


class Hook(abc.ABC):
    """Work that a training run does with the weights of some steps."""

    description: str  # as log lines name the results, in the plural

    def __init__(self, c: ConfigDict, context: TrainContext):
        self._c, self._context = c, context

    def run(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        """Runs the hook. An error is logged in one line and training continues.

        Args:
          step: Number of the step that `state` has.
          state: The state, which the hook only reads.
          stop: Returns True if the run is to save and exit; asked between batches.

        Raises:
          Exception: Any error that occurs in this process and not in the others, which wait for it.
          ConfigError: metrics.jsonl could not be written before.
        """
        self._context.metric_writer.flush()  # An earlier error is not one of the hook.
        with self._context.metric_writer.pause_timer():
            try:
                self._run(step, state, stop)
            except _StopError:
                logging.info("asked to stop: the %s of step %d are left out", self.description, step)
            except Exception as error:
                logging.error(
                    "the %s of step %d are left out: %s", self.description, step, storage.cause_message(error)
                )
                if not partitioning.all_failed():
                    raise

    @abc.abstractmethod
    def _run(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        """Does the work of the hook; see `run`."""

    def _weights(self, state: train_step.State) -> Any:
        return state.ema if self._c.sample.weights == "ema" else state.params

    def _codec_params(self) -> Any:
        context = self._context
        return context.codec_params or jax.device_put(context.setup.codec.load(), partitioning.replicated(context.mesh))


class _StopError(Exception):
    """The run is to save and exit."""


class Validation(Hook):
    """Losses on `train.validate_n` images of `evaluate.split`, always with the same noise."""

    description = "losses of validation"

    def __init__(self, c: ConfigDict, context: TrainContext, process_index: int, process_count: int):
        """Checks that the split can be read.

        Args:
          c: The config.
          context: The resources of the run.
          process_index: Index of this process among those that read different rows of a batch.
          process_count: Number of those processes.

        Raises:
          ConfigError: The split cannot be opened.
        """
        c = c.copy_and_resolve_references()
        c.data.split, c.data.flip, c.data.workers = c.evaluate.split, False, 0
        super().__init__(c, context)
        self._share = {
            "batch": c.train.batch // process_count,
            "process_index": process_index,
            "process_count": process_count,
        }
        pipeline.train_iterator(c, **self._share, validation=True)  # Raises before training starts.
        loss = train_step.make_loss(context.setup, c, dropout=0.0)

        def measure(params: Any, batch: dict[str, Array], *rest: Any) -> tuple[dict[str, Array], Array | int]:
            lengths = batch.get("lengths")
            return loss(params, batch, *rest)[1], 0 if lengths is None else losses.count_predicted_tokens(lengths)

        # (params, batch, codec params, key) -> metrics, number of predicted tokens
        self._program = jax.jit(measure, out_shardings=partitioning.replicated(context.mesh))

    def _run(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        c, mesh, weights, codec_params = self._c, self._context.mesh, self._weights(state), self._codec_params()
        key = jax.random.fold_in(jax.random.key(seeds.of(c, "data")), VALIDATION_STREAM)
        batch_metrics: list[dict[str, Any]] = []
        counts: list[int] = []
        data = pipeline.train_iterator(c, **self._share, validation=True)
        with contextlib.closing(data):
            for i in range(math.ceil(c.train.validate_n / c.train.batch)):
                if stop():
                    raise _StopError
                batch = partitioning.global_batch(next(data), mesh)
                outputs = self._program(weights, batch, codec_params, jax.random.fold_in(key, i))
                metrics, count = jax.device_get(outputs)
                batch_metrics.append(metrics)
                counts.append(count)
        self._context.metric_writer.write_validation(
            step, len(batch_metrics) * c.train.batch, _average_text_loss(batch_metrics, counts, c.loss.text)
        )


def _average_text_loss(
    batch_metrics: list[dict[str, Any]], counts: Sequence[int], weight: float
) -> list[dict[str, Any]]:
    """Replaces the text loss of each batch by the mean over the tokens of all batches.

    The loss, of which it is a term, changes accordingly.

    Args:
      batch_metrics: Metrics of each batch.
      counts: Number of predicted tokens of each batch, 0 without captions.
      weight: Weight of the text term in the loss.
    """
    if "loss_text" not in batch_metrics[0]:
        return batch_metrics
    mean = np.dot([float(m["loss_text"]) for m in batch_metrics], counts) / max(1, np.sum(counts))
    return [m | {"loss_text": mean, "loss": m["loss"] + weight * (mean - m["loss_text"])} for m in batch_metrics]


class SamplingHook(Hook):
    """A hook that consumes the first n of the `sample.n` images of a config."""

    def __init__(self, c: ConfigDict, context: TrainContext, n: int):
        """Checks the noise and the prompts of the images.

        Args:
          c: The config.
          context: The resources of the run.
          n: Number of images, at most `sample.n`.

        Raises:
          ConfigError: The file of `sample.noise` or a prompt cannot be used.
        """
        super().__init__(c, context)
        self._n = n
        generation.open_noise(c), prompts.tokenize(c)  # Raises before training starts.

    def _run(self, step: int, state: train_step.State, stop: Callable[[], bool]) -> None:
        self._consume(step, self._sample_batches(state, stop))

    def _sample_batches(self, state: train_step.State, stop: Callable[[], bool]) -> Iterator[generation.SampleBatch]:
        c, mesh, n, drawn = self._c, self._context.mesh, self._n, 0
        weights, codec_params, sample_fn = self._weights(state), self._codec_params(), self._context.sample_fn
        if self._context.guide_params is not None:
            weights = weights, self._context.guide_params
        for batch in generation.batches(c, sample_fn, weights, codec_params, mesh, range(n), max_batch=n):
            yield batch
            drawn += len(batch.images)
            if drawn < n and stop():
                raise _StopError

    @abc.abstractmethod
    def _consume(self, step: int, batches: Iterator[generation.SampleBatch]) -> None:
        """Consumes the images of a step while they are drawn."""


class SampleGrid(SamplingHook):
    """A grid of samples in workdir/samples/step_..._{ema,raw}.png and in TensorBoard.

    It is scaled down to at most `MAX_GRID_SIDE` pixels.
    """

    description = "samples"

    def __init__(self, c: ConfigDict, context: TrainContext, workdir: str):
        super().__init__(c, context, min(c.sample.n, c.sample.grid))
        self._folder = epath.Path(workdir) / "samples"

    def _consume(self, step: int, batches: Iterator[generation.SampleBatch]) -> None:
        weights = self._c.sample.weights
        images = generation.downscale_for_grid(np.concatenate([batch.images for batch in batches]), MAX_GRID_SIDE)
        canvas = generation.tile_grid(prompts.add_caption_strips(images, prompts.load(self._c)[: len(images)]))
        path = self._folder / f"step_{step:06d}_{weights}.png"
        logging.info("drew %d samples with the %s weights: %s", self._n, weights, path)
        self._context.metric_writer.save_png(path, canvas)
        self._context.metric_writer.log_image(step, f"samples_{weights}", canvas)


class Scores(SamplingHook):
    """Scores of `train.evaluate_n` images in the log, workdir/metrics.jsonl and TensorBoard."""

    description = "scores"

    def __init__(self, c: ConfigDict, context: TrainContext, judge: Judge):
        c = c.copy_and_resolve_references()
        c.sample.n = c.train.evaluate_n
        super().__init__(c, context, c.sample.n)
        self._judge = judge

    def _consume(self, step: int, batches: Iterator[generation.SampleBatch]) -> None:
        features = sample_scores.extract_features(batches, self._judge.extract, self._judge.attribute_classifier)
        labeled = bool(self._c.model.classes)
        scores = sample_scores.compute_scores(self._c, self._judge, features, labeled=labeled)
        self._context.metric_writer.write_scores(step, self._n, scores)
