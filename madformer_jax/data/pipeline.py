"""The input pipeline: source -> order -> batches of indices -> read and preprocess, with grain.

Everything is a function of (config.seed, position), where position counts the records drawn since the start of
training, over all processes. Records are shuffled anew each epoch; global batch k holds the positions
[k * G, (k + 1) * G), of which process p of n takes the p-th of n equal runs. So global batch k is the same, row by row,
for any number of processes or workers, and the iterator's whole state is k.
"""

import functools
import json
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from madformer_jax.data import preprocess, records, sources, text, worker
from madformer_jax.data.source import Examples, Kind, Source
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import malloc

Batch = dict[str, Any]  # name -> array (b, ...)


class DatasetInfo(NamedTuple):
    """What start-up needs to know of the data."""

    records: int
    classes: int  # 0: unlabelled
    image_shape: tuple[int, ...]  # (H, W, c) of one record as the model gets it; of cached latents (h, w, C)
    kind: Kind  # what the records are
    names: tuple[str, ...]  # of the classes; () if unlabelled
    fingerprint: str  # of which records these are, in which order; the same wherever they lie
    codec: str = ""  # weights.fingerprint of the VAE that made cached latents; "" where it is not known, or for images


class Selection(NamedTuple):
    """One record of the order, before it is read; batched, each field is an array (b,)."""

    record: Any  # int
    flip: Any  # bool


SkippedRecords = dict[str, list[str]]  # number of a record that cannot be read -> its name and the reason


def read_record(source: Source, table: preprocess.Preprocessor, number: int) -> Examples:
    """A record by itself; its image is decoded: uint8 (1, size, size, c).

    Raises:
      preprocess.CorruptImageError, OSError: it cannot be read.
      ConfigError: the memory does not suffice.
    """
    try:
        return _decode_images(source.read(np.array([number])), table)
    except MemoryError:
        raise ConfigError(f"{source.name(number)}: the memory does not suffice to read it.") from None


def _decode_images(found: Examples, table: preprocess.Preprocessor) -> Examples:
    if "image" in found.arrays:
        found.arrays["image"] = table.batch(found.arrays["image"])
    return found


def _check_skipped(config: ConfigDict, skipped: SkippedRecords, count: int) -> None:
    if len(skipped) > config.data.max_corrupt * count:
        name, reason = list(skipped.values())[-1]
        raise ConfigError(
            f"{name} cannot be read ({reason}): {len(skipped)} of {count} records, more than config.data.max_corrupt="
            f"{config.data.max_corrupt}. Mend or remove the files, or allow more."
        )


class _BatchLoader:
    """Reads and preprocesses a batch.

    For each record that cannot be read the next one that can be stands in, which is the same one whenever the batch is read
    again; they are named in "skipped" (`Skipped` as JSON).
    """

    def __init__(self, source: Source, config: ConfigDict):
        self._source, self._config, self._table = source, config, make_preprocessor(config)

    def __call__(self, pick: Selection) -> Batch:
        skipped: SkippedRecords = {}
        try:
            arrays, labels, captions, _ = _decode_images(self._source.read(pick.record), self._table)
        except (preprocess.CorruptImageError, OSError, MemoryError):
            found = [self._readable(number, skipped) for number in pick.record.tolist()]
            arrays = {name: np.concatenate([one.arrays[name] for one in found]) for name in found[0].arrays}
            labels = np.concatenate([one.labels for one in found])
            captions = [one.captions[0] for one in found]
        if "image" in arrays:
            arrays["image"][pick.flip] = arrays["image"][pick.flip, :, ::-1]
        batch = {**arrays, "label": labels}
        if self._config.text.vocabulary:
            texts = text.conditioning_texts(self._config, captions, labels, self._source.names)
            batch |= text.encode(self._config, texts, lambda i: self._source.name(int(pick.record[i])))._asdict()
        return {**batch, "skipped": json.dumps(skipped)} if skipped else batch

    def _readable(self, number: int, skipped: SkippedRecords) -> Examples:
        """The record, or the next one that can be read; those before it go into `skipped`."""
        while True:
            try:
                return read_record(self._source, self._table, number)
            except (preprocess.CorruptImageError, OSError) as error:
                skipped[str(number)] = [self._source.name(number), first_line(error)]
            _check_skipped(self._config, skipped, len(self._source))
            number = (number + 1) % len(self._source)


def _copy_from_shared_memory(batch: Batch) -> Batch:
    """The batch in memory of this process: grain frees what it shared as soon as its own array goes, views or not."""
    return {name: x if name == "skipped" else np.array(x) for name, x in batch.items()}


def _random_flip(record: int, rng: np.random.Generator) -> Selection:
    return Selection(record, bool(rng.random() < 0.5))


def _stack_selections(picks: list[Selection]) -> Selection:
    chosen, flips = zip(*picks)
    return Selection(np.array(chosen), np.array(flips))


def _without_flips(chosen: list[int]) -> Selection:
    return Selection(np.array(chosen), np.zeros(len(chosen), bool))


def _process_rows(pick: Selection, first: int, count: int) -> Selection:
    """One process's rows of a global batch."""
    return Selection(*(x[first : first + count] for x in pick))


def make_preprocessor(config: ConfigDict) -> preprocess.Preprocessor:
    """The preprocessing table that `config.data` sets.

    Raises:
      ConfigError: images have 1 or 3 channels; the background is no colour.
    """
    data = config.data
    if data.channels not in preprocess.CHANNELS:
        raise ConfigError(f"config.data.channels={data.channels}: images have 1 (grey) or 3 (RGB).")
    return preprocess.Preprocessor(
        data.image_size, data.channels, data.crop, preprocess.hex_color(data.background), data.max_pixels
    )


def dataset_info(config: ConfigDict) -> DatasetInfo:
    """Opens the source, reads nothing more than its index, and checks that it fits the config.

    Raises:
      ConfigError: the source does not open, is empty, or has labels that the model has no class for.
    """
    return _source_info(config, sources.open_source(config))


def _source_info(config: ConfigDict, source: Source) -> DatasetInfo:
    t = make_preprocessor(config)
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
                "docs/text.md on where they lie, or take the names of classes with config.text.caption=class."
            )
    shape, codec = (t.size, t.size, t.channels), ""
    if source.manifest is not None:
        records.check_manifest(source.manifest, config, t)
        shape, codec = tuple(source.manifest["shape"]), (source.manifest["codec"] or {}).get("weights", "")
    return DatasetInfo(len(source), source.classes, shape, source.kind, source.names, source.fingerprint, codec)


def train_iterator(
    config: ConfigDict, *, batch: int, process_index: int = 0, process_count: int = 1, validation: bool = False
) -> grain.DatasetIterator:
    """Endless batches for training, shuffled anew each epoch; see the module's text for what is deterministic.

    Args:
      config: the whole config; `data` and `seed` matter.
      batch: records of this process in each step; the same for every process.
      process_index, process_count: which of how many processes this is.
      validation: not to train on: any split will do.

    Returns:
      A grain iterator over {"image": uint8 (batch, H, W, c), "label": int32 (batch,)}, or of cached
      latents {"mean", "logvar": float16 (batch, h, w, C), "label"}; with captions also "tokens": int32 (batch, T) and
      "lengths": int32 (batch,). Its state,
      {"next_batch": k}, is the same in every process and restores onto any number of processes and workers. Call
      `close()` when done: it stops the workers.

    Raises:
      ConfigError: as `describe`; the split is held out; and, from `next`, when more than a share `data.max_corrupt` of the
        records cannot be read. Up to then they are logged by name, and the next record stands in for each.
    """
    if config.data.split in ("test", "composition") and not validation:
        raise ConfigError(f"config.data.split={config.data.split!r} is held out: training must not see it.")
    source = sources.open_source(config)
    info = _source_info(config, source)
    order = grain.MapDataset.range(info.records).seed(config.seed).shuffle().repeat()
    everywhere = batch * process_count
    if config.data.flip:
        batches = order.random_map(_random_flip).batch(everywhere, batch_fn=_stack_selections)
    else:
        batches = order.batch(everywhere, batch_fn=_without_flips)
    batches = batches.map(functools.partial(_process_rows, first=process_index * batch, count=batch))
    return _BatchIterator(batches.map(_BatchLoader(source, config)), config, info.records)


def _prefetching_iterator(batches: grain.MapDataset, workers: int, threads: int, waiting: int) -> grain.DatasetIterator:
    """Reads `batches` ahead, in threads of this process or in worker processes, up to `waiting` of them in each."""
    malloc.retain_memory()
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=waiting)
    if not workers:
        return iter(batches.to_iter_dataset(ahead))
    worker.block_jax_in_workers()
    if not flags.FLAGS.is_parsed():  # grain reads flags of its own; only absl.app parses them
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=waiting)
    return iter(batches.to_iter_dataset(ahead).mp_prefetch(options, worker_init_fn=worker.init_worker))


class _BatchIterator(grain.DatasetIterator):
    """Iterator whose state is the number of the next batch, so that it restores onto any number of workers.

    As grain's experimental ElasticIterator, but for batches that are read as a whole.
    """

    def __init__(self, batches: grain.MapDataset, config: ConfigDict, count: int):
        """Of batches that `_Load` reads from `count` records."""
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
        except ConfigError as error:  # grain appends a paragraph on its tracebacks
            raise ConfigError(str(error).partition("\n")[0]) from None
        self._next += 1
        if self._config.data.workers:
            batch = _copy_from_shared_memory(batch)
        self._note(json.loads(batch.pop("skipped", "{}")))
        return batch

    def _note(self, skipped: SkippedRecords) -> None:
        """Logs the records that could not be read, once each, and stops where they are too many."""
        for number in skipped.keys() - self._skipped.keys():
            self._skipped[number] = skipped[number]
            name, reason = skipped[number]
            logging.warning(
                "passed over %s: %s (%d of %d records so far)", name, reason, len(self._skipped), self._count
            )
        _check_skipped(self._config, self._skipped, self._count)

    def start_prefetch(self) -> None:
        if self._running is None:
            d = self._config.data
            self._running = _prefetching_iterator(self._batches[self._next :], d.workers, d.threads, d.batches_ahead)
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
