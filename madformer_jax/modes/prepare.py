"""--mode=prepare: writes a data source as ArrayRecord shards of images or VAE latents.

    python -m madformer_jax.main --config=... --mode=prepare --workdir=DIR --config.prepare.kind=latents

Shard k holds the images [k * s, (k + 1) * s) of the source (s is `prepare.shard`), in order, without corrupt images. A shard
is first written to a temporary file, so that it appears as a whole. A JSON file next to it marks it as
finished. After a kill, the same command makes only the unfinished shards. Process p of P makes the
shards p, p + P, p + 2 P and so on. The last process writes manifest.json, without which no training
starts. On a complete folder, the command compares all checksums and makes damaged shards again.
`data.records` defines the files and reads them.
"""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from madformer_jax.data import pipeline, preprocess, records, sources
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import lock, partitioning, preemption, storage
from madformer_jax.sampling import codec

PLAN_FILE = "plan.json"


class Decoded(NamedTuple):
    """A decoded image of the source. If it is corrupt, `pixels` is None and `reason` says why."""

    name: str
    pixels: np.ndarray | None
    label: int = 0
    caption: str = ""
    attributes: Any = ()
    reason: str = ""


def run(
    config: ConfigDict,
    workdir: str,
    *,
    encoder: codec.Encoder | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> dict[str, Any]:
    """Prepares the data of `config.data` according to `config.prepare`; resumes a stopped preparation.

    Args:
      config: The config; `data`, `prepare` and, for latents, `codec` matter.
      workdir: The folder of the shards.
      encoder: The encoder for latents; by default the VAE of `config.codec` on all devices.
      process_index: Index of this process; by default JAX's.
      process_count: Number of processes; by default JAX's.

    Returns:
      Figures of this process: shards, made (shards that did not exist before), records, skipped, bytes.

    Raises:
      ConfigError: The source does not open, or too many images are corrupt. Or the folder holds a run
        or shards that were made in another way, or it cannot be written.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if jax.process_count() > 1:  # processes do not wait for each other, and finished shards stay
        preemption.exit_on_sigterm()
    folder = epath.Path(workdir)
    source = sources.open_source(config)
    preprocessor = pipeline.make_preprocessor(config)
    _check_source(config, source)
    with storage.wrap_errors(f"--workdir={workdir} cannot be written"):
        for name in ("config.json", "checkpoints"):
            if (folder / name).exists():
                raise ConfigError(
                    f"--workdir={workdir} holds a run ({name}): use a separate folder for --mode=prepare."
                )
        with lock.acquire(workdir):
            latents = config.prepare.kind == "latents"
            encoder = (encoder or codec.encoder(config, config.prepare.batch)) if latents else None
            plan = _make_plan(config, source, preprocessor, encoder)
            _check_plan(folder, plan)
            mine = range(process_index, plan["shards"], process_count)
            total, silent = sum(len(_shard_indices(plan, k)) for k in mine), process_index != 0
            with tqdm(total=total, desc=f"preparing {plan['kind']}", unit="image", disable=silent) as bar:
                shards = _find_finished_shards(folder, plan, mine, bar)
                todo = [k for k in mine if k not in shards]
                logging.info(
                    "%s: %d of %d shards to make, of up to %d images", workdir, len(todo), len(mine), plan["shard"]
                )
                decode = functools.partial(_decode, source, preprocessor)
                shards |= _make_shards(config, folder, plan, todo, decode, encoder, [*shards.values()], bar)
            if jax.process_count() > 1:
                partitioning.sync("prepare")  # JAX would take a process that leaves early for a dead one
            _write_manifest(config, folder, plan)
    return {
        "shards": len(shards), "made": len(todo), "records": sum(shard.records for shard in shards.values()),
        "skipped": sum(len(shard.skipped) for shard in shards.values()),
        "bytes": sum(shard.size for shard in shards.values()),
    }  # fmt: skip


def _check_source(config: ConfigDict, source: Source) -> None:
    if config.prepare.kind == "latents" and config.codec.name != "vae":
        raise ConfigError(f"config.prepare.kind=latents needs config.codec.name=vae; it is {config.codec.name!r}.")
    if source.kind != "images":
        raise ConfigError(f"config.data.path={config.data.path!r} holds latents: --mode=prepare needs images.")
    if not len(source):
        raise ConfigError(f"config.data.source={config.data.source} has no images.")
    if config.model.classes and not source.classes:
        logging.warning(
            "config.model.classes=%d, but config.data.source=%s has no labels: training needs them, or model.classes=0",
            config.model.classes, config.data.source,
        )  # fmt: skip


def _make_plan(
    config: ConfigDict, source: Source, preprocessor: preprocess.Preprocessor, encoder: codec.Encoder | None
) -> dict[str, Any]:
    """Returns everything that decides the content of the shards."""
    p = config.prepare
    return {
        "format": records.FORMAT,
        "kind": p.kind,
        "image": preprocessor.describe(),
        "flip": p.flip,
        "codec": encoder.describe() if encoder else None,
        "source": config.data.source,
        "split": config.data.split,
        "images": len(source),
        "classes": source.classes,
        "names": list(source.names),  # class names
        "files": source.fingerprint,
        "shard": p.shard,
        "shards": -(-len(source) // p.shard),
        **({"attributes": [[name, [*values]] for name, values in source.attributes]} if source.attributes else {}),
    }


def _check_plan(folder: epath.Path, plan: dict[str, Any]) -> None:
    """Writes the plan, or checks that the folder's plan is the same."""
    before = records.read_sealed(folder / PLAN_FILE)
    if before is None:
        records.write_sealed(folder / PLAN_FILE, plan)
        return
    different = [f"{key} was {before.get(key)!r} and is {plan[key]!r}" for key in plan if before.get(key) != plan[key]]
    if different:
        raise ConfigError(
            f"{folder} holds shards that were made in another way: {'; '.join(different)}. "
            "Use another folder, or delete this one."
        )


def _find_finished_shards(
    folder: epath.Path, plan: dict[str, Any], mine: Sequence[int], bar: Any
) -> dict[int, records.Shard]:
    """Returns the shards of `mine` that are finished and intact.

    If the folder is complete, it compares checksums, too.
    """
    files = {path.name for path in folder.iterdir()}
    complete, made = records.MANIFEST in files, {}
    if complete:
        logging.info("%s is complete: comparing checksums", folder)
    for k in mine:
        if f"{_shard_file(plan, k)}.json" not in files:
            continue
        try:
            shard = _read_shard_summary(folder, plan, k)
            intact = records.is_complete(folder / shard.file, shard, checksum=complete)
        except ConfigError as error:
            logging.warning("%s", error)
            intact = False
        if not intact:
            logging.warning("%s is missing or damaged: making it again", folder / _shard_file(plan, k))
            continue
        made[k] = shard
        bar.update(len(_shard_indices(plan, k)))
    return made


def _make_shards(
    config: ConfigDict,
    folder: epath.Path,
    plan: dict[str, Any],
    todo: list[int],
    decode: Callable[[Sequence[int], ThreadPoolExecutor, int], Iterator[Decoded]],
    encoder: codec.Encoder | None,
    before: list[records.Shard],
    bar: Any,
) -> dict[int, records.Shard]:
    """Makes the shards `todo`. `before` lists the shards that were finished earlier."""
    batch = encoder.batch if encoder else config.prepare.batch
    made: dict[int, records.Shard] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow releases the GIL
        decoded = decode([i for k in todo for i in _shard_indices(plan, k)], threads, batch)
        for k in todo:
            images = itertools.islice(decoded, len(_shard_indices(plan, k)))
            made[k] = _write_shard(folder, plan, k, images, encoder, batch, bar)
            records.write_sealed(_done_path(folder, plan, k), made[k]._asdict())
            _check_corrupt(config, plan, [*before, *made.values()])
    return made


def _shard_indices(plan: dict[str, Any], k: int) -> range:
    return range(k * plan["shard"], min((k + 1) * plan["shard"], plan["images"]))


def _shard_file(plan: dict[str, Any], k: int) -> str:
    return f"shard-{k:05}-of-{plan['shards']:05}.arrayrecord"


def _done_path(folder: epath.Path, plan: dict[str, Any], k: int) -> epath.Path:
    return folder / f"{_shard_file(plan, k)}.json"


def _read_shard_summary(folder: epath.Path, plan: dict[str, Any], k: int) -> records.Shard:
    content = records.read_sealed(_done_path(folder, plan, k))
    if content is None:
        raise ConfigError(f"{_done_path(folder, plan, k)} is missing: run --mode=prepare again.")
    return records.Shard(**content)


def _decode(
    source: Source,
    preprocessor: preprocess.Preprocessor,
    indices: Sequence[int],
    threads: ThreadPoolExecutor,
    batch: int,
) -> Iterator[Decoded]:
    """Yields the images of `indices` in order. The threads decode up to two batches ahead."""

    def decode(index: int) -> Decoded:
        name = source.name(index)
        try:
            record = pipeline.read_record(source, preprocessor, index)
            attributes = () if record.attributes is None else record.attributes[0]
            return Decoded(name, record.arrays["image"][0], int(record.labels[0]), record.captions[0], attributes)
        except OSError as error:  # the disk is at fault, not the image: do not skip it
            raise ConfigError(f"{name} cannot be read: {error}") from error
        except preprocess.CorruptImageError as error:
            return Decoded(name, None, reason=first_line(error))

    ahead: collections.deque[Future[Decoded]] = collections.deque()
    for index in indices:
        ahead.append(threads.submit(decode, index))
        if len(ahead) > 2 * batch:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _write_shard(
    folder: epath.Path,
    plan: dict[str, Any],
    k: int,
    decoded: Iterator[Decoded],
    encoder: codec.Encoder | None,
    batch: int,
    bar: Any,
) -> records.Shard:
    """Writes one shard and returns its summary."""
    name = _shard_file(plan, k)
    if not storage.is_remote(folder):
        for leftover in storage.list_matching(folder, f".{name}.*.part"):  # of a killed process
            leftover.unlink()
    shard: records.Shard

    def write_records(file: IO[bytes]) -> None:
        nonlocal shard
        writer = records.open_writer(file.name)
        count, shape, skipped = 0, [], []
        chunks = iter(lambda: list(itertools.islice(decoded, batch)), [])
        encoded = ((chunk, _image_arrays(chunk, plan, encoder)) for chunk in chunks)
        # In pairs: the devices encode the next batch while this one is written.
        for (images, fields), _ in itertools.pairwise(itertools.chain(encoded, [([], [])])):
            skipped += [[image.name, image.reason] for image in images if image.pixels is None]
            good = [image for image in images if image.pixels is not None]
            if good:
                rows = _pack_records(good, fields, plan)
                shape = list(rows.dtype[-1].shape)
                with records.write_errors():
                    for image, copies in zip(good, rows):
                        for row in copies:
                            writer.write(row.tobytes() + image.caption.encode())
                count += rows.size
            bar.update(len(images))
        with records.write_errors():
            writer.close()
        size, sha256 = os.path.getsize(file.name), storage.sha256(file.name)
        shard = records.Shard(name, count, size, sha256, shape, skipped)

    storage.write(folder / name, write_records)
    return shard


def _image_arrays(images: list[Decoded], plan: dict[str, Any], encoder: codec.Encoder | None) -> list[dict[str, Any]]:
    """Returns the arrays of the decoded images and of their flipped copies.

    Latents may still be in computation on the devices. Every call encodes a full batch, so that the
    encoder is compiled only once.
    """
    good = [image.pixels for image in images if image.pixels is not None]
    if not good:
        return []
    pixels = np.stack(good if encoder is None else good + good[-1:] * (encoder.batch - len(good)))
    copies = [pixels, pixels[:, :, ::-1]] if plan["flip"] else [pixels]
    if encoder is None:
        return [{"image": copy} for copy in copies]
    return [dict(zip(("mean", "logvar"), encoder.encode(copy))) for copy in copies]


def _pack_records(images: list[Decoded], fields: list[dict[str, Any]], plan: dict[str, Any]) -> np.ndarray:
    """Returns records `(images, copies)` in the layout of `records.dtype`; 2 copies with flips, else 1."""
    arrays = [{name: np.asarray(x)[: len(images)] for name, x in copy.items()} for copy in fields]
    shape = next(iter(arrays[0].values())).shape[1:]
    rows = np.zeros((len(images), len(arrays)), records.dtype(plan["kind"], shape, len(plan.get("attributes", []))))
    for name in set(rows.dtype.names or ()) & {"label", "attributes"}:
        rows[name] = np.array([getattr(image, name) for image in images])[:, None]
    for i, copy in enumerate(arrays):
        for name, values in copy.items():
            rows[name][:, i] = values
    if plan["kind"] == "latents":
        bad = ~(np.isfinite(rows["mean"]) & np.isfinite(rows["logvar"])).all((1, 2, 3, 4))
        if bad.any():
            name = images[int(np.argmax(bad))].name
            raise ConfigError(
                f"{name}: its latents are not finite in float16: check the VAE, or encode in float32 (config.codec.dtype)."
            )
    return rows


def _check_corrupt(config: ConfigDict, plan: dict[str, Any], shards: list[records.Shard]) -> None:
    skipped = [image for shard in shards for image in shard.skipped]
    if len(skipped) > config.prepare.max_corrupt * plan["images"]:
        name, reason = skipped[-1]
        raise ConfigError(
            f"{len(skipped)} of {plan['images']} images are corrupt, more than config.prepare.max_corrupt="
            f"{config.prepare.max_corrupt}; the last is {name} ({reason}). Repair the source, or allow more and run again."
        )


def _write_manifest(config: ConfigDict, folder: epath.Path, plan: dict[str, Any]) -> None:
    """Writes the manifest if every shard is finished."""
    files = {path.name for path in folder.iterdir()}
    if not all(f"{_shard_file(plan, k)}.json" in files for k in range(plan["shards"])):
        logging.info("%s: other processes are still making shards; the last one writes the manifest", folder)
        return
    shards = [_read_shard_summary(folder, plan, k) for k in range(plan["shards"])]
    skipped = [image for shard in shards for image in shard.skipped]
    _check_corrupt(config, plan, shards)
    for name, reason in skipped:
        logging.warning("skipped %s: %s", name, reason)
    manifest = {
        **plan,
        "shape": next((shard.shape for shard in shards if shard.records), []),
        "records": sum(shard.records for shard in shards),
        "skipped": skipped,
        "shards": [{**shard._asdict(), "skipped": len(shard.skipped)} for shard in shards],
    }
    records.write_sealed(folder / records.MANIFEST, manifest)
    logging.info("%s: %d records of %d images, %d skipped", folder, manifest["records"], plan["images"], len(skipped))
