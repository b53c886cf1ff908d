"""The input pipeline: source -> order -> batches of indices -> read and preprocess, with grain.

Everything is a function of (config.seed, position), where position counts the records drawn since the start of
training, over all processes. Records are shuffled anew each epoch; global batch k holds the positions
[k * G, (k + 1) * G), of which process p of n takes each n-th. So the set of records in global batch k is the same for
any number of processes or workers, and the iterator's whole state is k.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from madformer_jax.config import ConfigError
from madformer_jax.data import preprocess, sources, worker

_BATCHES_AHEAD = 2  # decoded batches waiting in each process that reads
_THREADS = 2  # batches in the making there

Batch = dict[str, np.ndarray]


class DatasetInfo(NamedTuple):
    """What start-up needs to know of the data."""

    records: int
    classes: int  # 0: unlabelled
    image_shape: tuple[int, int, int]  # of one record as the model gets it


class Draw(NamedTuple):
    """One record of the order, before it is read; batched, each field is an array (b,)."""

    record: Any  # int
    flip: Any  # bool


class _Load:
    """Reads and preprocesses a batch."""

    def __init__(self, source: sources.Source, table: preprocess.Table):
        self._source, self._table = source, table

    def __call__(self, draw: Draw) -> Batch:
        pixels = np.empty((len(draw.record), self._table.size, self._table.size, self._table.channels), np.uint8)
        labels = np.empty(len(draw.record), np.int32)
        for i, record in enumerate(draw.record.tolist()):
            example = self._source[record]
            try:
                image = self._table.pixels(example.image)
            except preprocess.CorruptImageError as error:
                raise ConfigError(
                    f"{self._source.name(record)} cannot be decoded ({error}): remove the file, or run --mode=prepare, "
                    "which skips and lists such files."
                ) from None
            pixels[i] = image[:, ::-1] if draw.flip[i] else image
            labels[i] = example.label
        return {"image": preprocess.to_float(pixels), "label": labels}


def _draw(record: int, rng: np.random.Generator) -> Draw:
    return Draw(record, bool(rng.random() < 0.5))


def _keep(record: int) -> Draw:
    return Draw(record, False)


def table(config: ConfigDict) -> preprocess.Table:
    """The preprocessing table that `config.data` sets.

    Raises:
      ConfigError: images have 1 or 3 channels.
    """
    data = config.data
    if data.channels not in (1, 3):
        raise ConfigError(f"config.data.channels={data.channels}: images have 1 (grey) or 3 (RGB).")
    return preprocess.Table(data.image_size, data.channels, data.crop)


def describe(config: ConfigDict) -> DatasetInfo:
    """Opens the source, reads nothing more than its index, and checks that it fits the config.

    Raises:
      ConfigError: the source does not open, is empty, or has labels that the model has no class for.
    """
    return _describe(config, sources.open_source(config))


def _describe(config: ConfigDict, source: sources.Source) -> DatasetInfo:
    t = table(config)
    name, classes = config.data.source, config.model.classes
    if not len(source):
        raise ConfigError(f"config.data.source={name} is empty.")
    if classes and not source.classes:
        raise ConfigError(
            f"config.model.classes={classes} needs labels, and config.data.source={name} has none: "
            "sort the images into one subfolder a class, or set config.model.classes=0."
        )
    if classes and source.classes > classes:
        raise ConfigError(
            f"config.model.classes={classes} is too few for config.data.source={name}, which has {source.classes} classes."
        )
    return DatasetInfo(len(source), source.classes, (t.size, t.size, t.channels))


def train_iterator(
    config: ConfigDict, *, batch: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches for training, shuffled anew each epoch; see the module's text for what is deterministic.

    Args:
      config: the whole config; `data` and `seed` matter.
      batch: records of this process in each step; the same for every process.
      process_index, process_count: which of how many processes this is.

    Returns:
      A grain iterator over {"image": float32 (batch, H, W, c) in [-1, 1], "label": int32 (batch,)}. Its state,
      {"next_batch": k}, is the same in every process and restores onto any number of processes and workers. Call
      `close()` when done: it stops the workers.

    Raises:
      ConfigError: as `describe`; and, from `next`, an image that cannot be decoded, by name.
    """
    source = sources.open_source(config)
    info = _describe(config, source)
    order = grain.MapDataset.range(info.records).seed(config.seed).shuffle().repeat()
    draws = order.random_map(_draw) if config.data.flip else order.map(_keep)
    batches = draws[process_index::process_count].batch(batch, batch_fn=_stack)
    return _Batches(batches.map(_Load(source, table(config))), config.data.workers)


def ordered_batches(
    config: ConfigDict, *, batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every record once, in order and unflipped, for statistics; the last batch may be smaller.

    Process p of n takes each n-th record. Arguments, batches and errors as in `train_iterator`.
    """
    source = sources.open_source(config)
    info = _describe(config, source)
    draws = grain.MapDataset.range(info.records).map(_keep)[process_index::process_count]
    iterator = _iterate(draws.batch(batch, batch_fn=_stack).map(_Load(source, table(config))), config.data.workers)
    try:
        yield from iterator
    finally:
        iterator.close()


def _stack(draws: list[Draw]) -> Draw:
    records, flips = zip(*draws, strict=True)
    return Draw(np.array(records), np.array(flips))


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    """Reads `batches` ahead, in threads of this process or in worker processes."""
    ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    dataset = batches.to_iter_dataset(ahead)
    if workers:
        worker.keep_jax_out()
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own; only absl.app parses them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BATCHES_AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=worker.start)
    return iter(dataset)


class _Batches(grain.DatasetIterator):
    """Iterator whose state is the number of the next batch, so that it restores onto any number of workers.

    As grain's experimental ElasticIterator, but for batches that are read as a whole.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches, self._workers = batches, workers
        self._next = 0
        self._running: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        assert self._running is not None
        batch = next(self._running)
        self._next += 1
        return batch

    def start_prefetch(self) -> None:
        if self._running is None:
            self._running = _iterate(self._batches[self._next :], self._workers)
        self._running.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
