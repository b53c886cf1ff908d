"""--mode=prepare: any source becomes ArrayRecord shards of images or VAE latents.

    python -m madformer_jax.main --config=... --mode=prepare --workdir=DIR --config.prepare.kind=latents

Shard k holds the images [k * n, (k + 1) * n) of the source, in its order, minus those that do not decode. A shard is
written under another name, made durable and renamed; then a JSON file beside it says that it is finished. So whatever
is killed at whatever moment, running the same command again goes on with the first unfinished shard. Process p of n
makes each n-th shard; the last one to finish writes manifest.json, without which no training starts.
"""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from madformer_jax.config import ConfigError
from madformer_jax.data import pipeline, preprocess, records, sources

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
    workdir: str = "",
    *,
    encode: Encode | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> None:
    """Prepares the data of `config.data` as `config.prepare` says; goes on where an earlier run was stopped.

    Args:
      config: the whole config; `data`, `prepare` and, for latents, `codec` matter.
      workdir: where the shards go if `config.prepare.output` is "".
      encode: for latents, the VAE's encoder; by default that of `config.codec`.
      process_index, process_count: which of how many processes this is; by default JAX's.

    Raises:
      ConfigError: the source does not open, the folder holds shards made in another way, or too many images are
        corrupt.
    """
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    p = config.prepare
    folder = p.output or workdir
    source = sources.open_source(config)
    table = pipeline.table(config)
    plan = _plan(config, source, table)
    os.makedirs(folder, exist_ok=True)
    _check_plan(folder, plan, process_index)
    if p.kind == "latents":
        encode = encode or _encoder(config)
    else:
        encode = None

    mine = range(process_index, plan["shards"], process_count)
    todo = [k for k in mine if not os.path.exists(_done(folder, plan, k))]
    logging.info("%s: %d of %d shards to make, of up to %d images each", folder, len(todo), len(mine), p.shard)
    skipped = 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,  # Pillow decodes and resizes without the interpreter's lock
        tqdm(
            total=sum(len(_indices(plan, k)) for k in todo),
            unit="image",
            desc=f"preparing {p.kind}",
            disable=process_index != 0,
        ) as bar,
    ):
        decoded = _decode(source, table, [i for k in todo for i in _indices(plan, k)], threads, p.batch)
        for k in todo:
            images = itertools.islice(decoded, len(_indices(plan, k)))
            shard = _write(folder, plan, k, images, encode, p.batch, bar)
            records.write_json(_done(folder, plan, k), shard._asdict())
            skipped += len(shard.skipped)
            _check_corrupt(config, plan, skipped, shard)
    _finish(config, folder, plan, process_index)


def _plan(config: ConfigDict, source: sources.Source, table: preprocess.Table) -> dict[str, Any]:
    """Everything that decides the content of the shards."""
    p = config.prepare
    pipeline.describe(config)
    names = hashlib.sha256()
    for i in range(len(source)):
        names.update(f"{source.name(i)}\n".encode())
    return {
        "format": records.FORMAT,
        "kind": p.kind,
        "image": table.describe(),
        "flip": p.flip,
        "codec": {"path": config.codec.path, "dtype": config.codec.dtype} if p.kind == "latents" else None,
        "source": config.data.source,
        "images": len(source),
        "classes": source.classes,
        "names_sha256": names.hexdigest(),
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


def _encoder(config: ConfigDict) -> Encode:
    import jax

    from madformer_jax.models import vae

    if config.codec.name != "vae":
        raise ConfigError(f"config.prepare.kind=latents needs config.codec.name=vae; it is {config.codec.name!r}.")
    model, params = vae.load(config.codec.path, config.codec.dtype)
    encode = jax.jit(lambda params, images: vae.encode(model, params, images))
    return lambda images: jax.device_get(encode(params, images))


def _indices(plan: dict[str, Any], k: int) -> range:
    return range(k * plan["shard"], min((k + 1) * plan["shard"], plan["images"]))


def _file(plan: dict[str, Any], k: int) -> str:
    return f"shard-{k:05}-of-{plan['shards']:05}.arrayrecord"


def _done(folder: str, plan: dict[str, Any], k: int) -> str:
    return os.path.join(folder, f"{_file(plan, k)}.json")


def _decode(
    source: sources.Source, table: preprocess.Table, indices: Sequence[int], threads: ThreadPoolExecutor, batch: int
) -> Iterator[Decoded]:
    """The images of `indices`, in order, decoded ahead by the threads."""

    def decode(index: int) -> Decoded:
        name = source.name(index)
        try:
            example = source[index]
        except OSError as error:  # the disk's fault, not the image's: nothing to skip
            raise ConfigError(f"{name} cannot be read: {error}") from error
        try:
            return Decoded(name, table.pixels(example.image), example.label, example.caption)
        except preprocess.CorruptImageError as error:
            return Decoded(name, None, reason=str(error))

    ahead: deque[Future[Decoded]] = deque()
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
    while chunk := list(itertools.islice(decoded, batch)):
        good = [image for image in chunk if image.pixels is not None]
        skipped += [[image.name, image.reason] for image in chunk if image.pixels is None]
        if good:
            rows = _rows(good, plan, encode, batch)  # (images, copies)
            shape = list(rows.dtype[1].shape)
            for image, copies in zip(good, rows):
                for row in copies:
                    writer.write(row.tobytes() + image.caption.encode())
            count += rows.size
        bar.update(len(chunk))
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


def _rows(images: list[Decoded], plan: dict[str, Any], encode: Encode | None, batch: int) -> np.ndarray:
    """Records (images, 1, or 2 with flipped copies) in the layout of `records.dtype`."""
    pixels = np.stack([image.pixels for image in images if image.pixels is not None])
    copies = [pixels, pixels[:, :, ::-1]] if plan["flip"] else [pixels]
    if encode is None:
        fields = [{"image": copy} for copy in copies]
    else:
        fields = [_encode(copy, images, encode, batch) for copy in copies]
    shape = next(iter(fields[0].values())).shape[1:]
    rows = np.zeros((len(images), len(copies)), records.dtype(plan["kind"], shape))
    rows["label"] = np.array([image.label for image in images])[:, None]
    for i, copy in enumerate(fields):
        for name, values in copy.items():
            rows[name][:, i] = values
    return rows


def _encode(pixels: np.ndarray, images: list[Decoded], encode: Encode, batch: int) -> dict[str, np.ndarray]:
    """Latents of up to `batch` images, encoded as a full batch so that the encoder compiles once."""
    padding = np.repeat(pixels[-1:], batch - len(pixels), axis=0)
    mean, logvar = (
        np.asarray(x)[: len(pixels)] for x in encode(preprocess.to_float(np.concatenate([pixels, padding])))
    )
    finite = (np.isfinite(mean) & np.isfinite(logvar)).all((1, 2, 3))
    if not finite.all():
        name = images[int(np.argmin(finite))].name
        raise ConfigError(f"{name}: its latents are not finite; encode in float32 (config.codec.dtype), check the VAE.")
    return {"mean": mean, "logvar": logvar}


def _check_corrupt(config: ConfigDict, plan: dict[str, Any], skipped: int, shard: records.Shard) -> None:
    if skipped > config.prepare.max_corrupt * plan["images"]:
        name, reason = shard.skipped[-1]
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
    _check_corrupt(config, plan, len(skipped), next((s for s in reversed(shards) if s.skipped), shards[-1]))
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
