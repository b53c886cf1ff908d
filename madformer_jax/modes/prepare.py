"""--mode=prepare: any source becomes ArrayRecord shards of images or VAE latents in the workdir.

    python -m madformer_jax.main --config=... --mode=prepare --workdir=DIR --config.prepare.kind=latents

Shard k holds the images [k * n, (k + 1) * n) of the source, in its order, minus those that do not decode. A shard is
written beside its place, or locally where that is in a bucket, and appears whole; then a JSON file beside it says that it
is finished. So whatever is killed at whatever moment, running the same command again makes the unfinished shards and no
other. Process p of n makes each n-th shard; the last one to finish writes manifest.json, without which no training starts.
Run again on a folder that is complete, it compares all checksums and makes damaged shards anew.
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
    """One image of the source, or why there is none."""

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
    """Prepares the data of `config.data` as `config.prepare` says; goes on where an earlier run was stopped.

    Args:
      config: the whole config; `data`, `prepare` and, for latents, `codec` matter.
      workdir: where the shards go.
      encoder: for latents; by default the VAE of `config.codec` on all devices.
      process_index, process_count: which of how many processes this is; by default JAX's.

    Returns:
      Figures of this process: shards, made (those that were not there yet), records, skipped, bytes.

    Raises:
      ConfigError: the source does not open; the folder is a run's, holds shards made in another way or cannot be written; or
        too many images are corrupt.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if jax.process_count() > 1:  # none waits for another before its last shard, and what is finished is kept
        preemption.exit_on_sigterm()
    folder = epath.Path(workdir)
    source = sources.open_source(config)
    table = pipeline.make_preprocessor(config)
    _check_source(config, source)
    with storage.wrap_errors(f"--workdir={workdir} cannot be written"):
        for name in ("config.json", "checkpoints"):
            if (folder / name).exists():
                raise ConfigError(f"--workdir={workdir} holds a run ({name}): give --mode=prepare a folder of its own.")
        with lock.acquire(workdir):
            encoder = (
                (encoder or codec.encoder(config, config.prepare.batch)) if config.prepare.kind == "latents" else None
            )
            plan = _make_plan(config, source, table, encoder)
            _check_plan(folder, plan)
            mine = range(process_index, plan["shards"], process_count)
            total, silent = sum(len(_shard_indices(plan, k)) for k in mine), process_index != 0
            with tqdm(total=total, desc=f"preparing {plan['kind']}", unit="image", disable=silent) as bar:
                shards = _find_finished_shards(folder, plan, mine, bar)
                todo = [k for k in mine if k not in shards]
                logging.info(
                    "%s: %d of %d shards to make, of up to %d images", workdir, len(todo), len(mine), plan["shard"]
                )
                decode = functools.partial(_decode, source, table)
                shards |= _make_shards(config, folder, plan, todo, decode, encoder, [*shards.values()], bar)
            if jax.process_count() > 1:
                partitioning.sync("prepare")  # a process that leaves early would be taken for a dead one
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
        raise ConfigError(f"config.data.source={config.data.source} is empty.")
    if config.model.classes and not source.classes:
        logging.warning(
            "config.model.classes=%d, but config.data.source=%s has no labels: training needs them, or model.classes=0",
            config.model.classes, config.data.source,
        )  # fmt: skip


def _make_plan(
    config: ConfigDict, source: Source, table: preprocess.Preprocessor, encoder: codec.Encoder | None
) -> dict[str, Any]:
    """Everything that decides the content of the shards."""
    p = config.prepare
    return {
        "format": records.FORMAT,
        "kind": p.kind,
        "image": table.describe(),
        "flip": p.flip,
        "codec": encoder.describe() if encoder else None,
        "source": config.data.source,
        "split": config.data.split,
        "images": len(source),
        "classes": source.classes,
        "names": list(source.names),  # of the classes
        "files": source.fingerprint,
        "shard": p.shard,
        "shards": -(-len(source) // p.shard),
        **({"attributes": [[name, [*values]] for name, values in source.attributes]} if source.attributes else {}),
    }


def _check_plan(folder: epath.Path, plan: dict[str, Any]) -> None:
    before = records.read_sealed(folder / PLAN_FILE)
    if before is None:
        records.write_sealed(folder / PLAN_FILE, plan)
        return
    written = before.get("codec")
    if before.get("format") != records.FORMAT:
        raise ConfigError(
            f"{folder} was prepared by another version (format {before.get('format')}): it may be read, but not gone on with. "
            "Name another folder."
        )
    if written and plan["codec"]:  # an earlier version wrote fewer facts of the VAE
        before["codec"] = plan["codec"] | written
    different = [f"{key} was {before.get(key)!r} and is {plan[key]!r}" for key in plan if before.get(key) != plan[key]]
    if different:
        raise ConfigError(
            f"{folder} holds shards that were made in another way: {'; '.join(different)}. "
            "Name another folder, or delete this one."
        )
    if written != plan["codec"]:
        records.write_sealed(folder / PLAN_FILE, plan)


def _find_finished_shards(
    folder: epath.Path, plan: dict[str, Any], mine: Sequence[int], bar: Any
) -> dict[int, records.Shard]:
    """Those of the shards `mine` that are made and whole; where the folder was complete, as their checksums tell."""
    there = {path.name for path in folder.iterdir()}
    complete, made = records.MANIFEST in there, {}
    if complete:
        logging.info("%s is complete: comparing checksums", folder)
    for k in mine:
        if f"{_shard_file(plan, k)}.json" not in there:
            continue
        try:
            shard = _read_shard_summary(folder, plan, k)
            whole = records.is_complete(folder / shard.file, shard, checksum=complete)
        except ConfigError as error:
            logging.warning("%s", error)
            whole = False
        if not whole:
            logging.warning("%s is missing or damaged, and is made again", folder / _shard_file(plan, k))
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
    """Makes the shards `todo`; `before` are those that were there."""
    batch = encoder.batch if encoder else config.prepare.batch
    made: dict[int, records.Shard] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without the interpreter's lock
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
        raise ConfigError(f"{_done_path(folder, plan, k)} is gone: run --mode=prepare again.")
    return records.Shard(**content)


def _decode(
    source: Source, table: preprocess.Preprocessor, indices: Sequence[int], threads: ThreadPoolExecutor, batch: int
) -> Iterator[Decoded]:
    """The images of `indices`, in order, decoded ahead by the threads."""

    def decode(index: int) -> Decoded:
        name = source.name(index)
        try:
            found = pipeline.read_record(source, table, index)
            attributes = () if found.attributes is None else found.attributes[0]
            return Decoded(name, found.arrays["image"][0], int(found.labels[0]), found.captions[0], attributes)
        except OSError as error:  # the disk's fault, not the image's: nothing to skip
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
    """Makes one shard, durably, and describes it."""
    name = _shard_file(plan, k)
    if not storage.is_remote(folder):
        for part in storage.list_matching(folder, f".{name}.*.part"):  # of a process that was killed
            part.unlink()
    shard = records.Shard(name, 0, 0, "", [], [])

    def put(file: IO[bytes]) -> None:
        nonlocal shard
        writer = records.open_writer(file.name)
        count, shape, skipped = 0, [], []
        chunks = iter(lambda: list(itertools.islice(decoded, batch)), [])
        encoded = ((chunk, _image_arrays(chunk, plan, encoder)) for chunk in chunks)
        # in pairs, so that devices encode the next batch while this one is written
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
        shard = shard._replace(
            records=count,
            size=os.path.getsize(file.name),
            sha256=storage.sha256(file.name),
            shape=shape,
            skipped=skipped,
        )

    storage.write(folder / name, put)
    return shard


def _image_arrays(images: list[Decoded], plan: dict[str, Any], encoder: codec.Encoder | None) -> list[dict[str, Any]]:
    """The arrays of the images that decoded, and of their flipped copies; latents are still being computed.

    Every call encodes a full batch, so that the encoder is compiled once.
    """
    good = [image.pixels for image in images if image.pixels is not None]
    if not good:
        return []
    if encoder is None:
        pixels = np.stack(good)
        return [{"image": copy} for copy in _flipped_copies(pixels, plan)]
    pixels = np.stack(good + good[-1:] * (encoder.batch - len(good)))
    return [dict(zip(("mean", "logvar"), encoder.encode(copy))) for copy in _flipped_copies(pixels, plan)]


def _flipped_copies(pixels: np.ndarray, plan: dict[str, Any]) -> list[np.ndarray]:
    return [pixels, pixels[:, :, ::-1]] if plan["flip"] else [pixels]


def _pack_records(images: list[Decoded], fields: list[dict[str, Any]], plan: dict[str, Any]) -> np.ndarray:
    """Records (images, 1, or 2 with flipped copies) in the layout of `records.dtype`.

    Raises:
      ConfigError: names an image whose latents are not finite.
    """
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
                f"{name}: its latents are not finite in float16; check the VAE, or encode in float32 (config.codec.dtype)."
            )
    return rows


def _check_corrupt(config: ConfigDict, plan: dict[str, Any], shards: list[records.Shard]) -> None:
    skipped = [image for shard in shards for image in shard.skipped]
    if len(skipped) > config.prepare.max_corrupt * plan["images"]:
        name, reason = skipped[-1]
        raise ConfigError(
            f"{len(skipped)} of {plan['images']} images are corrupt, more than config.prepare.max_corrupt="
            f"{config.prepare.max_corrupt}; the last is {name} ({reason}). Mend the source, or allow more and run again."
        )


def _write_manifest(config: ConfigDict, folder: epath.Path, plan: dict[str, Any]) -> None:
    """Writes the manifest if every shard is there."""
    there = {path.name for path in folder.iterdir()}
    if not all(f"{_shard_file(plan, k)}.json" in there for k in range(plan["shards"])):
        logging.info("%s: other processes still make shards; the last one writes the manifest.", folder)
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
