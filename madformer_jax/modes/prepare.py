"""--mode=prepare: any source becomes ArrayRecord shards of images or VAE latents in the workdir.

    python -m madformer_jax.main --config=... --mode=prepare --workdir=DIR --config.prepare.kind=latents

Shard k holds the images [k * n, (k + 1) * n) of the source, in its order, minus those that do not decode. A shard is
written under another name, made durable and renamed; then a JSON file beside it says that it is finished. So whatever
is killed at whatever moment, running the same command again makes the unfinished shards and no other. Process p of n
makes each n-th shard; the last one to finish writes manifest.json, without which no training starts. Run again on a
folder that is complete, it compares all checksums and makes damaged shards anew.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from madformer_jax.data import pipeline, preprocess, records, sources
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError
from madformer_jax.weights import vae as vae_weights

PLAN = "plan.json"

Encode = Callable[[np.ndarray], tuple[Any, Any]]  # images (b, H, W, c) in [-1, 1] -> mean, logvar (b, h, w, C)


class Decoded(NamedTuple):
    """One image of the source, or why there is none."""

    name: str
    pixels: np.ndarray | None
    label: int = 0
    caption: str = ""
    reason: str = ""


def run(
    config: ConfigDict,
    workdir: str,
    *,
    encode: Encode | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> None:
    """Prepares the data of `config.data` as `config.prepare` says; goes on where an earlier run was stopped.

    Args:
      config: the whole config; `data`, `prepare` and, for latents, `codec` matter.
      workdir: where the shards go.
      encode: for latents, the VAE's encoder of `prepare.batch` images; by default that of `config.codec`.
      process_index, process_count: which of how many processes this is; by default JAX's.

    Raises:
      ConfigError: the source does not open, the folder holds shards made in another way or cannot be written, or too
        many images are corrupt.
    """
    together = process_index is None or process_count is None
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    source = sources.open_source(config)
    table = pipeline.table(config)
    plan = _plan(config, source, table)
    try:
        os.makedirs(workdir, exist_ok=True)
        _check_plan(workdir, plan, process_index)
        mine = range(process_index, plan["shards"], process_count)
        with tqdm(
            total=sum(len(_indices(plan, k)) for k in mine),
            desc=f"preparing {plan['kind']}",
            unit="image",
            disable=process_index != 0,
        ) as bar:
            finished = _finished(workdir, plan, mine, bar)
            todo = [k for k in mine if k not in finished]
            logging.info(
                "%s: %d of %d shards to make, of up to %d images", workdir, len(todo), len(mine), plan["shard"]
            )
            if todo:
                decode = functools.partial(_decode, source, table)
                _make(config, workdir, plan, todo, decode, encode, [s for s in finished.values() if s.skipped], bar)
        if together and process_count > 1:
            from madformer_jax.runtime import partitioning

            partitioning.sync("prepare")  # a process that leaves early would be taken for a dead one
        _finish(config, workdir, plan, process_index)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror or error}.") from None


def _plan(config: ConfigDict, source: Source, table: preprocess.Table) -> dict[str, Any]:
    """Everything that decides the content of the shards."""
    p = config.prepare
    if p.kind == "latents" and config.codec.name != "vae":
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
    names = hashlib.sha256()
    for i in range(len(source)):
        names.update(f"{source.name(i).removeprefix(config.data.path)}\n".encode())
    return {
        "format": records.FORMAT,
        "kind": p.kind,
        "image": table.describe(),
        "flip": p.flip,
        "codec": {"path": config.codec.path, "dtype": config.codec.dtype} if p.kind == "latents" else None,
        "source": config.data.source,
        "split": config.data.split,
        "images": len(source),
        "classes": source.classes,
        "names": names.hexdigest(),  # of the files, in order
        "shard": p.shard,
        "shards": -(-len(source) // p.shard),
    }


def _check_plan(folder: str, plan: dict[str, Any], process: int) -> None:
    path = os.path.join(folder, PLAN)
    if not os.path.exists(path):
        records.write_json(path, plan, process)
        return
    with open(path) as file:
        before = json.load(file)
    different = [f"{key} was {before.get(key)!r} and is {plan[key]!r}" for key in plan if before.get(key) != plan[key]]
    if different:
        raise ConfigError(
            f"{folder} holds shards that were made in another way: {'; '.join(different)}. "
            "Name another folder, or delete this one."
        )


def _finished(folder: str, plan: dict[str, Any], mine: Sequence[int], bar: Any) -> dict[int, records.Shard]:
    """Those of the shards `mine` that are made and whole; where the folder was complete, as their checksums tell."""
    complete, made = os.path.exists(os.path.join(folder, records.MANIFEST)), {}
    if complete:
        logging.info("%s is complete: comparing checksums", folder)
    for k in mine:
        path = os.path.join(folder, _file(plan, k))
        if not os.path.exists(_done(folder, plan, k)):
            continue
        with open(_done(folder, plan, k)) as file:
            shard = records.Shard(**json.load(file))
        if shard.records and not records.is_whole(path, shard, checksum=complete):
            logging.warning("%s is missing or damaged, and is made again", path)
            continue
        made[k] = shard
        bar.update(len(_indices(plan, k)))
    return made


def _make(
    config: ConfigDict,
    folder: str,
    plan: dict[str, Any],
    todo: list[int],
    decode: Callable[[Sequence[int], ThreadPoolExecutor, int], Iterator[Decoded]],
    encode: Encode | None,
    corrupt: list[records.Shard],
    bar: Any,
) -> None:
    """Makes the shards `todo`; `corrupt` are those made before in which images were skipped."""
    batch = config.prepare.batch
    if plan["kind"] == "images":
        encode = None
    elif encode is None:
        encode, batch = _encoder(config)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without the interpreter's lock
        decoded = decode([i for k in todo for i in _indices(plan, k)], threads, batch)
        for k in todo:
            images = itertools.islice(decoded, len(_indices(plan, k)))
            shard = _write(folder, plan, k, images, encode, batch, bar)
            records.write_json(_done(folder, plan, k), shard._asdict())
            corrupt = [*corrupt, shard] if shard.skipped else corrupt
            _check_corrupt(config, plan, corrupt)


def _encoder(config: ConfigDict) -> tuple[Encode, int]:
    """The VAE's encoder over all devices of this process, and the images it takes at once."""
    import jax

    from madformer_jax.models import vae
    from madformer_jax.runtime import partitioning

    model, params = vae_weights.load(config.codec.path, config.codec.dtype)
    mesh = partitioning.make_mesh(-1, 1, 1, jax.local_devices())
    rows = partitioning.batch_sharding(mesh)
    params = jax.device_put(params, partitioning.replicated(mesh))
    program = jax.jit(lambda params, images: vae.encode(model, params, images), out_shardings=rows)

    def encode(images: np.ndarray) -> tuple[Any, Any]:
        with partitioning.scope(mesh):
            return program(params, jax.device_put(images, rows))

    devices = len(jax.local_devices())
    return encode, math.ceil(config.prepare.batch / devices) * devices


def _indices(plan: dict[str, Any], k: int) -> range:
    return range(k * plan["shard"], min((k + 1) * plan["shard"], plan["images"]))


def _file(plan: dict[str, Any], k: int) -> str:
    return f"shard-{k:05}-of-{plan['shards']:05}.arrayrecord"


def _done(folder: str, plan: dict[str, Any], k: int) -> str:
    return os.path.join(folder, f"{_file(plan, k)}.json")


def _decode(
    source: Source, table: preprocess.Table, indices: Sequence[int], threads: ThreadPoolExecutor, batch: int
) -> Iterator[Decoded]:
    """The images of `indices`, in order, decoded ahead by the threads."""

    def decode(index: int) -> Decoded:
        name = source.name(index)
        try:
            found = pipeline.read_one(source, table, index)
            return Decoded(name, found.arrays["image"][0], int(found.labels[0]), found.captions[0])
        except OSError as error:  # the disk's fault, not the image's: nothing to skip
            raise ConfigError(f"{name} cannot be read: {error}") from error
        except preprocess.CorruptImageError as error:
            return Decoded(name, None, reason=str(error))

    ahead: collections.deque[Future[Decoded]] = collections.deque()
    for index in indices:
        ahead.append(threads.submit(decode, index))
        if len(ahead) > 2 * batch:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _write(
    folder: str, plan: dict[str, Any], k: int, decoded: Iterator[Decoded], encode: Encode | None, batch: int, bar: Any
) -> records.Shard:
    """Makes one shard, durably, and describes it."""
    path = os.path.join(folder, _file(plan, k))
    part = f"{path}.part"
    writer = records.writer(part)
    count, shape, skipped = 0, [], []
    chunks = iter(lambda: list(itertools.islice(decoded, batch)), [])
    encoded = ((chunk, _fields(chunk, plan, encode, batch)) for chunk in chunks)
    # in pairs, so that devices encode the next batch while this one is written
    for (images, fields), _ in itertools.pairwise(itertools.chain(encoded, [([], [])])):
        skipped += [[image.name, image.reason] for image in images if image.pixels is None]
        good = [image for image in images if image.pixels is not None]
        if good:
            rows = _rows(good, fields, plan["kind"])
            shape = list(rows.dtype[1].shape)
            with records.write_errors():
                for image, copies in zip(good, rows):
                    for row in copies:
                        writer.write(row.tobytes() + image.caption.encode())
            count += rows.size
        bar.update(len(images))
    with records.write_errors():
        writer.close()
    if not count:
        os.remove(part)
        return records.Shard("", 0, 0, "", shape, skipped)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    shard = records.Shard(_file(plan, k), count, os.path.getsize(part), records.sha256(part), shape, skipped)
    os.replace(part, path)
    records.sync_folder(folder)
    return shard


def _fields(images: list[Decoded], plan: dict[str, Any], encode: Encode | None, batch: int) -> list[dict[str, Any]]:
    """The arrays of the images that decoded, and of their flipped copies; latents are still being computed.

    Every call encodes a full batch, so that the encoder is compiled once.
    """
    good = [image.pixels for image in images if image.pixels is not None]
    if not good:
        return []
    if encode is None:
        pixels = np.stack(good)
        return [{"image": copy} for copy in _copies(pixels, plan)]
    pixels = preprocess.to_float(np.stack(good + good[-1:] * (batch - len(good))))
    return [dict(zip(("mean", "logvar"), encode(copy))) for copy in _copies(pixels, plan)]


def _copies(pixels: np.ndarray, plan: dict[str, Any]) -> list[np.ndarray]:
    return [pixels, pixels[:, :, ::-1]] if plan["flip"] else [pixels]


def _rows(images: list[Decoded], fields: list[dict[str, Any]], kind: str) -> np.ndarray:
    """Records (images, 1, or 2 with flipped copies) in the layout of `records.dtype`.

    Raises:
      ConfigError: names an image whose latents are not finite.
    """
    arrays = [{name: np.asarray(x)[: len(images)] for name, x in copy.items()} for copy in fields]
    shape = next(iter(arrays[0].values())).shape[1:]
    rows = np.zeros((len(images), len(arrays)), records.dtype(kind, shape))
    rows["label"] = np.array([image.label for image in images])[:, None]
    for i, copy in enumerate(arrays):
        for name, values in copy.items():
            rows[name][:, i] = values
    if kind == "latents":
        bad = ~(np.isfinite(rows["mean"]) & np.isfinite(rows["logvar"])).all((1, 2, 3, 4))
        if bad.any():
            name = images[int(np.argmax(bad))].name
            raise ConfigError(
                f"{name}: its latents are not finite in float16; check the VAE, or encode in float32 (config.codec.dtype)."
            )
    return rows


def _check_corrupt(config: ConfigDict, plan: dict[str, Any], corrupt: list[records.Shard]) -> None:
    skipped = sum(len(shard.skipped) for shard in corrupt)
    if skipped > config.prepare.max_corrupt * plan["images"]:
        name, reason = corrupt[-1].skipped[-1]
        raise ConfigError(
            f"{skipped} of {plan['images']} images are corrupt, more than config.prepare.max_corrupt="
            f"{config.prepare.max_corrupt}; the last is {name} ({reason}). Mend the source, or allow more and run again."
        )


def _finish(config: ConfigDict, folder: str, plan: dict[str, Any], process: int) -> None:
    """Writes the manifest if every shard is there."""
    shards = []
    for k in range(plan["shards"]):
        if not os.path.exists(_done(folder, plan, k)):
            logging.info("%s: other processes still make shards; the last one writes the manifest.", folder)
            return
        with open(_done(folder, plan, k)) as file:
            shards.append(records.Shard(**json.load(file)))
    skipped = [image for shard in shards for image in shard.skipped]
    _check_corrupt(config, plan, [shard for shard in shards if shard.skipped])
    for name, reason in skipped:
        logging.warning("skipped %s: %s", name, reason)
    manifest = {
        **plan,
        "shape": next((shard.shape for shard in shards if shard.records), []),
        "records": sum(shard.records for shard in shards),
        "skipped": skipped,
        "shards": [{**shard._asdict(), "skipped": len(shard.skipped)} for shard in shards],
    }
    records.write_json(os.path.join(folder, records.MANIFEST), manifest, process)
    logging.info("%s: %d records of %d images, %d skipped", folder, manifest["records"], plan["images"], len(skipped))
