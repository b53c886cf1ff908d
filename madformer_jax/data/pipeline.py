"""Input pipeline, built with grain: source -> order -> batches of indices -> read, preprocess.

Training calls `train_iterator` for batches and `dataset_info` for the facts of the data. Sources
are in `sources`, the treatment of an image is in `preprocess`.

Batches are a function of (seed of the data, position), where position counts the records drawn since the
start of training, over all processes. Each epoch is shuffled anew. Global batch k of G records
holds the positions [k * G, (k + 1) * G). Process p of n takes the p-th of n equal parts of it.
Global batch k is therefore the same, row by row, for any number of processes or workers, and k is
the whole state of the iterator.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from madformer_jax.config import seeds
from madformer_jax.data import compatibility, listing, preprocess, sources, text, worker
from madformer_jax.data.source import Examples, Kind, Source
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import malloc

Batch = dict[str, Any]  # name -> array (b, ...)


class DatasetInfo(NamedTuple):
    """Facts of a data set that do not require reading its records."""

    records: int
    classes: int  # 0: unlabeled
    image_shape: tuple[int, ...]  # (H, W, c) of one preprocessed record; (h, w, C) for cached latents
    kind: Kind
    names: tuple[str, ...]  # of the classes; () if unlabeled
    fingerprint: str  # identifies the records and their order, wherever the files are stored
    codec: str = ""  # weights.fingerprint of the VAE that made cached latents; "" if unknown, or for images
    scale: tuple[float, float] | None = None  # scaling and shift factor of this VAE; None for other data


class Selection(NamedTuple):
    """One record of the order, before it is read; batched, each field is an array (b,)."""

    record: Any  # int
    flip: Any  # bool


_READ_AT_ONCE = 256  # records, in `read_all`
SkippedRecords = dict[str, list[str]]  # number of a record that cannot be read -> [name, reason]


def read_record(source: Source, preprocessor: preprocess.Preprocessor, number: int) -> Examples:
    """Reads a single record and decodes its image to uint8 (1, size, size, c).

    Raises:
      preprocess.CorruptImageError, OSError: The record cannot be read.
      ConfigError: The memory does not suffice.
    """
    try:
        return _decode_images(source.read(np.array([number])), preprocessor)
    except MemoryError:
        raise ConfigError(f"{source.name(number)}: the memory does not suffice to read it.") from None


def _decode_images(examples: Examples, preprocessor: preprocess.Preprocessor) -> Examples:
    if "image" in examples.arrays:
        examples.arrays["image"] = preprocessor.process_batch(examples.arrays["image"])
    return examples


def _check_skipped(config: ConfigDict, skipped: SkippedRecords, count: int) -> None:
    too_many = len(skipped) > config.data.max_corrupt * count
    if too_many or len(skipped) == count:
        name, reason = list(skipped.values())[-1]
        limit = f", more than config.data.max_corrupt={config.data.max_corrupt}" if too_many else ""
        remedy = "Repair or remove the files, or raise the limit" if too_many else "Repair the files"
        raise ConfigError(f"{name} cannot be read ({reason}): {len(skipped)} of {count} records{limit}. {remedy}.")


class _BatchLoader:
    """Reads and preprocesses a batch.

    A record that cannot be read is replaced by the next readable record, which is the same one
    whenever the batch is read again. Entry "skipped" of the batch lists the records that were
    replaced (`SkippedRecords` as JSON).
    """

    def __init__(self, source: Source, config: ConfigDict):
        self._source, self._config, self._preprocessor = source, config, make_preprocessor(config)

    def __call__(self, selection: Selection) -> Batch:
        skipped, numbers = SkippedRecords(), selection.record.tolist()
        try:
            examples = _decode_images(self._source.read(selection.record), self._preprocessor)
            arrays, labels, captions = examples.arrays, examples.labels, examples.captions
        except (preprocess.CorruptImageError, OSError, MemoryError):
            numbers, rows = zip(*(self._read_next_readable(number, skipped) for number in numbers))
            arrays = {name: np.concatenate([row.arrays[name] for row in rows]) for name in rows[0].arrays}
            labels = np.concatenate([row.labels for row in rows])
            captions = [row.captions[0] for row in rows]
        if "image" in arrays:
            arrays["image"][selection.flip] = arrays["image"][selection.flip, :, ::-1]
        batch = {**arrays, "label": labels}
        if self._config.text.vocabulary:
            texts = text.conditioning_texts(self._config, captions, labels, self._source.names)
            batch |= text.encode(self._config, texts, lambda i: self._source.name(numbers[i]))._asdict()
        return {**batch, "skipped": json.dumps(skipped)} if skipped else batch

    def _read_next_readable(self, number: int, skipped: SkippedRecords) -> tuple[int, Examples]:
        """Reads the first readable record from `number` on and its number, adding those before it to `skipped`."""
        while True:
            try:
                return number, read_record(self._source, self._preprocessor, number)
            except (preprocess.CorruptImageError, OSError) as error:
                skipped[str(number)] = [self._source.name(number), first_line(error)]
            _check_skipped(self._config, skipped, len(self._source))
            number = (number + 1) % len(self._source)


def _random_flip(record: int, rng: np.random.Generator) -> Selection:
    return Selection(record, bool(rng.random() < 0.5))


def _stack_selections(selections: list[Selection]) -> Selection:
    records, flips = zip(*selections)
    return Selection(np.array(records), np.array(flips))


def _without_flips(records: list[int]) -> Selection:
    return Selection(np.array(records), np.zeros(len(records), bool))


def _take_rows(rows: slice, selection: Selection) -> Selection:
    return Selection(*(x[rows] for x in selection))


def make_preprocessor(config: ConfigDict) -> preprocess.Preprocessor:
    """Builds the preprocessor that `config.data` describes.

    Raises:
      ConfigError: The number of channels is not 1 or 3, or the background is not a color.
    """
    data = config.data
    if data.channels not in preprocess.CHANNELS:
        raise ConfigError(f"config.data.channels={data.channels}: images have 1 (gray) or 3 (RGB).")
    return preprocess.Preprocessor(
        data.image_size, data.channels, data.crop, preprocess.hex_color(data.background), data.max_pixels
    )


def dataset_info(config: ConfigDict) -> DatasetInfo:
    """Opens the source, reads only its index, and checks that it fits the config.

    Raises:
      ConfigError: The source does not open or is empty, its labels or captions do not fit the
        model, or prepared records do not fit the config.
    """
    return _source_info(config, sources.open_source(config))


def _source_info(config: ConfigDict, source: Source) -> DatasetInfo:
    preprocessor = make_preprocessor(config)
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
    if config.text.vocabulary:
        text.tokenizer_for_config(config)
        if not text.record_texts(config, source, np.array([0]))[0]:
            raise ConfigError(
                f"config.text.vocabulary={config.text.vocabulary} needs captions, and {source.name(0)} has none: see "
                "docs/text.md on where to put them, or take the names of classes with config.text.caption=class."
            )
    shape: tuple[int, ...] = (preprocessor.size, preprocessor.size, preprocessor.channels)
    facts: Mapping[str, Any] = {}
    if source.manifest is not None:
        compatibility.check_manifest(source.manifest, config, preprocessor)
        shape, facts = tuple(source.manifest["shape"]), source.manifest["codec"] or {}
    elif source.kind == "latents":
        shape = source.read(np.arange(0)).arrays["mean"].shape[1:]
        compatibility.check_latents(config, shape)
    if source.kind == "images" and config.codec.name == "external":
        raise ConfigError(
            f"config.codec.name='external' needs latents, and config.data.source={name} holds images: use source npy."
        )
    scale = (facts["scaling_factor"], facts.get("shift_factor", 0.0)) if facts else None
    return DatasetInfo(
        len(source), source.classes, shape, source.kind, source.names, source.fingerprint, facts.get("weights", ""), scale
    )  # fmt: skip


def open_records(config: ConfigDict) -> tuple[DatasetInfo, Callable[[np.ndarray], Batch]]:
    """Opens the source for reading records by number, in the order of the source and without flips.

    Returns:
      The facts of the data, and a function that reads the batch of records with numbers (b,). A record
      that cannot be read is logged and replaced by the next readable one.

    Raises:
      ConfigError: The data do not fit the config (see `dataset_info`).
    """
    source = sources.open_source(config)
    info, load = _source_info(config, source), _BatchLoader(source, config)

    def read(records: np.ndarray) -> Batch:
        batch = load(_without_flips(records.tolist()))
        for name, reason in json.loads(batch.pop("skipped", "{}")).values():
            listing.warn_once(f"skipped unreadable record {name}: {reason}")  # scores read an image several times
        return batch

    return info, read


def train_iterator(
    config: ConfigDict, *, batch: int, process_index: int = 0, process_count: int = 1, validation: bool = False
) -> grain.DatasetIterator:
    """Returns endless batches for training, shuffled anew each epoch.

    Records that cannot be read are logged by name, and the next record replaces each. The docstring
    of the module says what the batches depend on.

    Args:
      config: The whole config.
      batch: Records of this process in each step; the same for every process.
      process_index: Index of this process.
      process_count: Number of processes.
      validation: Allows held-out splits, for batches that are not trained on.

    Returns:
      A grain iterator over {"image": uint8 (batch, H, W, c), "label": int32 (batch,)}. Cached
      latents have {"mean", "logvar": float16 (batch, h, w, C)} in place of "image". A model with
      captions also gets {"tokens": int32 (batch, T), "lengths": int32 (batch,)}. The state of the
      iterator, {"next_batch": k}, is the same in every process and restores onto any number of
      processes and workers. Call `close()` at the end to stop the workers.

    Raises:
      ConfigError: The data do not fit the config (see `dataset_info`), or the split is held out.
        `next` raises it when more than the share `data.max_corrupt` of the records cannot be read.
    """
    if not validation:
        _check_trainable(config)
    source = sources.open_source(config)
    info = _source_info(config, source)
    batches = _selections(config, info.records, batch * process_count)
    batches = batches.map(functools.partial(_take_rows, slice(process_index * batch, (process_index + 1) * batch)))
    return _BatchIterator(batches.map(_BatchLoader(source, config)), config, info.records)


def _selections(config: ConfigDict, records: int, global_batch: int) -> grain.MapDataset:
    """Returns the endless global batches of `Selection`, shuffled anew each epoch."""
    order = grain.MapDataset.range(records).seed(seeds.of(config, "data")).shuffle().repeat()
    if config.data.flip:
        return order.random_map(_random_flip).batch(global_batch, batch_fn=_stack_selections)
    return order.batch(global_batch, batch_fn=_without_flips)


def selection_iterator(config: ConfigDict, *, batch: int) -> grain.DatasetIterator:
    """Returns the record numbers and flips of the batches of `train_iterator`, without reading the records.

    Returns:
      A grain iterator over {"record": int (batch,), "flip": bool (batch,)}, with the states of
      `train_iterator`. `record` is a row of `read_all`.
    """
    config = config.copy_and_resolve_references()
    config.data.workers = 0
    records = _source_info(config, sources.open_source(config)).records
    batches = _selections(config, records, batch)
    return _BatchIterator(batches.map(lambda selection: selection._asdict()), config, records)


def read_all(config: ConfigDict) -> Batch:
    """Reads all records of the training split as one batch without flips.

    A record that cannot be read is replaced as in `train_iterator`.

    Raises:
      ConfigError: See `train_iterator`.
    """
    _check_trainable(config)
    source = sources.open_source(config)
    records = _source_info(config, source).records
    load, skipped, chunks = _BatchLoader(source, config), SkippedRecords(), []
    for first in range(0, records, _READ_AT_ONCE):
        chunk = load(_without_flips([*range(first, min(first + _READ_AT_ONCE, records))]))
        skipped |= json.loads(chunk.pop("skipped", "{}"))
        _check_skipped(config, skipped, records)
        chunks.append(chunk)
    for name, reason in skipped.values():
        logging.warning("skipped unreadable record %s: %s", name, reason)
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _check_trainable(config: ConfigDict) -> None:
    names = re.split(r"\s*[+[]\s*", config.data.split)  # tfds has splits such as train+test[:9]
    if not set(names).isdisjoint(sources.source_class(config).held_out):
        raise ConfigError(f"config.data.split={config.data.split!r} is held out: training must not see it.")


def _prefetching_iterator(batches: grain.MapDataset, data: ConfigDict) -> grain.DatasetIterator:
    """Reads up to `data.batches_ahead` batches ahead, in threads or in each worker process."""
    malloc.keep_batch_memory()
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.batches_ahead)
    if not data.workers:
        return iter(batches.to_iter_dataset(options))
    worker.block_jax_in_workers()
    if not flags.FLAGS.is_parsed():  # grain reads absl flags, which only absl.app parses
        flags.FLAGS.mark_as_parsed()
    processes = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=data.batches_ahead)
    return iter(batches.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=worker.init_worker))


class _BatchIterator(grain.DatasetIterator):
    """Iterator over batches whose state is the number of the next batch.

    The state restores onto any number of workers. The class resembles grain's experimental
    ElasticIterator, but reads each batch as a whole.
    """

    def __init__(self, batches: grain.MapDataset, config: ConfigDict, count: int):
        """Starts at batch 0 of `batches`. The source has `count` records."""
        super().__init__()
        self._batches, self._config, self._count = batches, config, count
        self._next = 0
        self._skipped: SkippedRecords = {}
        self._running: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        assert self._running is not None
        try:
            batch = next(self._running)
        except ConfigError as error:  # grain appends a paragraph about its tracebacks
            raise ConfigError(str(error).partition("\n")[0]) from None
        self._next += 1
        self._log_skipped(json.loads(batch.pop("skipped", "{}")))
        if self._config.data.workers:  # grain frees shared memory with its own array, even if views of it exist
            return {name: np.array(x) for name, x in batch.items()}
        return batch

    def _log_skipped(self, skipped: SkippedRecords) -> None:
        """Logs each unreadable record once, and raises ConfigError if there are too many."""
        for number in skipped.keys() - self._skipped.keys():
            self._skipped[number] = skipped[number]
            name, reason = skipped[number]
            logging.warning(
                "skipped unreadable record %s: %s (%d of %d records so far)",
                name,
                reason,
                len(self._skipped),
                self._count,
            )
        _check_skipped(self._config, self._skipped, self._count)

    def start_prefetch(self) -> None:
        if self._running is None:
            self._running = _prefetching_iterator(self._batches[self._next :], self._config.data)
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
