"""Helpers for tests of prepared data: source images, a stand-in for the VAE, and expected content.

`tests/modes/test_prepare.py` tests writing, `tests/data/test_records.py` tests reading.
"""

import os
import pathlib

import ml_collections
import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.data import sources
from madformer_jax.sampling import codec
from tests.support import kill_prepare


def make_config(folder: pathlib.Path) -> ConfigDict:
    """Writes 23 images, two of them corrupt. Returns a config with shards of 5 images."""
    kill_prepare.make_images(folder / "images", 23, corrupt=(4, 9))
    c = config_lib.base()
    c.data.source, c.data.path, c.data.image_size = "folder", str(folder / "images"), 16
    c.data.split = "all"
    c.model.blocks = c.model.unet_stride = 1
    c.prepare.shard, c.prepare.batch, c.prepare.max_corrupt = 5, 3, 0.1
    return c


def vae(images):
    """Encodes 16 x 16 pixels as 2 x 2 positions, each (mean of red, mean of blue, 2, 3)."""
    mean = np.ones((len(images), 2, 2, 4), np.float32) * [0, 1, 2, 3]
    mean[..., 0] = images[..., 0].reshape(-1, 2, 8, 2, 8).mean((2, 4))
    mean[..., 1] = images[..., 2].reshape(-1, 2, 8, 2, 8).mean((2, 4))
    return mean, -mean


ENCODER = codec.Encoder(vae, batch=3, weights="abc")


def prepared(config, out):
    """Returns a config that reads the prepared folder `out`."""
    c = ml_collections.ConfigDict(config.to_dict())
    c.data.source, c.data.path = "arrayrecord", out
    return c


def ids(config, out) -> list[int]:
    """Returns the numbers of the images in a prepared folder, in order."""
    source = sources.open_source(prepared(config, out))
    examples = source.read(np.arange(len(source)))
    pixels = examples.arrays["image"][:, 0, 0]
    numbers = pixels[:, 0] + 256 * pixels[:, 1].astype(int)
    assert (examples.labels == numbers % 2).all()
    return numbers.tolist()


GOOD = [i for i in [*range(0, 23, 2), *range(1, 23, 2)] if i not in (4, 9)]  # the folder's order


def flip(path: str, position: int) -> None:
    """Flips the lowest bit of a byte of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
