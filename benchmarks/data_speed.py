"""Measures the speed of the input pipeline on this machine.

    python -m benchmarks.data_speed

prints records per second for cached latents, and images per second for image files next to Pillow
alone (docs/data.md). Run it on an idle machine.
"""

import io
import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.data import pipeline, preprocess
from madformer_jax.modes import prepare
from madformer_jax.sampling import codec

WARM_UP = 10  # batches, so that prefetched ones are not measured
SECONDS = 5  # of each measurement
THREADS = 2  # of a worker, as in the pipeline
BATCH = 16  # images


def rate(config: ConfigDict, batch: int) -> float:
    """Returns the records per second that training would get."""
    batches = pipeline.train_iterator(config, batch=batch)
    for _ in range(WARM_UP):
        next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + SECONDS:
        next(batches)
        count += batch
    seconds = time.perf_counter() - began
    batches.close()
    return count / seconds


def latents(folder: str, side: int, batch: int) -> None:
    """Prints the speed of reading cached latents of side x side from `folder`."""

    def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(images), side, side, 4)
        return tuple(np.random.default_rng(0).standard_normal(shape, np.float32) for _ in range(2))

    c = config_lib.base()
    c.data.source, c.data.image_size = "digits", 32
    c.prepare.kind = "latents"
    prepare.run(c, folder, encoder=codec.Encoder(encode, c.prepare.batch, ""), process_index=0, process_count=1)
    c.data.source, c.data.path = "arrayrecord", folder
    for workers in (0, 1):
        c.data.workers = workers
        print(f"latents {side} x {side} x 4, batch {batch}, {_reader(c)}: {rate(c, batch):.0f} records/s", flush=True)


def images(folder: pathlib.Path, kind: str, shape: tuple[int, int], size: int, count: int) -> None:
    """Prints the speed of the pipeline and of Pillow alone on the same files and threads."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize(shape, Image.Resampling.BICUBIC).save(folder / f"{i}.{kind}", quality=90)
    files = sorted(folder.iterdir())
    side = min(shape)
    left, top = (shape[0] - side) / 2, (shape[1] - side) / 2
    preprocessor = preprocess.Preprocessor(size, 3, crop=True)

    def decode_pillow(file: pathlib.Path) -> np.ndarray:
        image = Image.open(io.BytesIO(file.read_bytes()))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return np.asarray(image)

    def decode_ours(batch: list[pathlib.Path]) -> np.ndarray:
        return np.stack([preprocessor.process(file.read_bytes()) for file in batch])

    def images_per_second(run: Callable[[list[pathlib.Path]], object]) -> float:
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + SECONDS:
            run(files[:BATCH])
            count += BATCH
        return count / (time.perf_counter() - began)

    label = f"{kind} {shape[0]} x {shape[1]} to {size} x {size}"
    pillow = images_per_second(lambda batch: [decode_pillow(file) for file in batch])
    ours = images_per_second(decode_ours)
    print(f"{label}, one thread: {ours:.0f} images/s, Pillow alone {pillow:.0f}: {ours / pillow:.0%}", flush=True)
    with ThreadPoolExecutor(THREADS) as threads:
        pillow = images_per_second(lambda batch: list(threads.map(decode_pillow, batch)))
    c = config_lib.base()
    c.data.source, c.data.path, c.data.image_size = "folder", str(folder), size
    for workers in (0, 1):
        c.data.workers = workers
        ours = rate(c, BATCH)
        print(
            f"{label}, {_reader(c)}: {ours:.0f} images/s, Pillow alone in {THREADS} threads {pillow:.0f}: {ours / pillow:.0%}",
            flush=True,
        )


def _reader(config: ConfigDict) -> str:
    return "one worker process" if config.data.workers else "in the training process"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        latents(f"{folder}/32", 32, 256)
        latents(f"{folder}/128", 128, 64)
        images(pathlib.Path(folder) / "jpg", "jpg", (500, 375), 256, 200)
        images(pathlib.Path(folder) / "webp", "webp", (1024, 1024), 1024, BATCH)


if __name__ == "__main__":
    main()
