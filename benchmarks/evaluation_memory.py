"""Measures the peak memory of a reference and an evaluation of large images.

    python -m benchmarks.evaluation_memory --folder=DIR [--n=8000]

writes n JPEG files of 1024 x 1024 to DIR, which are hard links to 16 pictures. It then runs
--mode=reference and --mode=evaluate on them (docs/evaluation.md). A cheap network with as many
features and classes replaces Inception, so the figures exclude the memory of the network.
"""

import argparse
import os
import pathlib
import resource

from madformer_jax.runtime import malloc

if __name__ == "__main__":
    malloc.restart_with_tunables()  # as the command line does
os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from ml_collections import ConfigDict
from PIL import Image

from madformer_jax.config import schema
from madformer_jax.evaluation.networks import registry
from madformer_jax.evaluation.networks.inception import Inception
from madformer_jax.modes import evaluate, reference

SIDE, PICTURES, DIMS, CLASSES = 1024, 16, 2048, 1008


class StandIn(Inception):
    """A network that multiplies every 64th pixel with random matrices."""

    channels = (3,)

    @classmethod
    def open(cls, path: str) -> "StandIn":
        random = np.random.default_rng(0)
        params = {"features": random.standard_normal((768, DIMS), np.float32) / 28}
        return cls(params | {"logits": random.standard_normal((DIMS, CLASSES), np.float32) / 45})

    def apply(self, params: dict[str, Array], images: Array) -> tuple[Array, Array]:
        pixels = images[:, ::64, ::64].reshape(len(images), -1).astype(jnp.float32)
        features = jnp.tanh((pixels / 128 - 1) @ params["features"])
        return features, features @ params["logits"]


def write_pictures(folder: pathlib.Path, n: int) -> None:
    """Writes n image files to the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"{i:05d}.jpg"
        if i < PICTURES:
            small = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(small).resize((SIDE, SIDE)).save(path)
        else:
            os.link(folder / f"{i % PICTURES:05d}.jpg", path)


def settings(folder: pathlib.Path, n: int) -> ConfigDict:
    c = schema.base()
    c.codec.name, c.codec.patch = "pixel", 8
    c.data.source, c.data.path, c.data.image_size = "folder", str(folder / "pictures"), SIDE
    c.evaluate.network, c.evaluate.split, c.evaluate.images, c.evaluate.n = "inception", "all", "data:all", n
    return c


def peak() -> float:
    """Returns the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(folder: pathlib.Path, n: int) -> None:
    """Prints the peaks of both modes, without the memory in use before them."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures", n)
    registry.NETWORKS["inception"] = StandIn
    registry.make_extractor(StandIn.open(""))(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    before = peak()
    print(f"with the network: {before:.2f} GiB", flush=True)
    c = settings(folder, n)
    reference.run(c, str(folder))
    print(f"reference of {n} images: {peak() - before:.2f} GiB above that", flush=True)
    evaluate.run(c, str(folder))
    print(f"evaluation of {n} images: {peak() - before:.2f} GiB above that", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--n", type=int, default=8000)
    logging.set_verbosity(logging.ERROR)
    args = parser.parse_args()
    run(args.folder, args.n)
