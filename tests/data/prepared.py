"""Images to prepare, a stand-in for the VAE, and what a prepared folder then holds: for the tests of both sides."""

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
    """23 images, two of them corrupt, in shards of 5."""
    kill_prepare.make_images(folder / "images", 23, corrupt=(4, 9))
    c = config_lib.base()
    c.data.source, c.data.path, c.data.image_size = "folder", str(folder / "images"), 16
    c.data.split = "all"
    c.model.blocks = c.model.unet_stride = 1
    c.prepare.shard, c.prepare.batch, c.prepare.max_corrupt = 5, 3, 0.1
    return c


def vae(images):
    """A stand-in for the VAE: 16 x 16 pixels become 2 x 2 positions, each (red mean, 1, 2, 3)."""
    mean = np.ones((len(images), 2, 2, 4), np.float32) * [0, 1, 2, 3]
    mean[..., 0] = images[..., 0].reshape(-1, 2, 8, 2, 8).mean((2, 4))
    mean[..., 1] = images[..., 2].reshape(-1, 2, 8, 2, 8).mean((2, 4))
    return mean, -mean


ENCODER = codec.Encoder(vae, batch=3, weights="abc")


def prepared(config, out):
    c = ml_collections.ConfigDict(config.to_dict())
    c.data.source, c.data.path = "arrayrecord", out
    return c


def ids(config, out) -> list[int]:
    """Numbers of the images that a prepared folder holds, in order."""
    found = sources.open_source(prepared(config, out))
    images, labels, *_ = found.read(np.arange(len(found)))
    numbers = images["image"][:, 0, 0, 0] + 256 * images["image"][:, 0, 0, 1].astype(int)
    assert (labels == numbers % 2).all()
    return numbers.tolist()


GOOD = [i for i in [*range(0, 23, 2), *range(1, 23, 2)] if i not in (4, 9)]  # the folder's order


def flip(path: str, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
