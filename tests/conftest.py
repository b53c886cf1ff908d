"""Eight virtual CPU devices for every test, so that meshes can be tested on one machine; programs compiled quickly, not well."""

import atexit
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that several tests, or processes of one, run are compiled once.
_CACHE = tempfile.mkdtemp(prefix="madformer-tests-")
os.environ |= {"JAX_COMPILATION_CACHE_DIR": _CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

import numpy as np
import pytest
from ml_collections import ConfigDict

from madformer_jax import config


@pytest.fixture
def tiny_config() -> ConfigDict:
    """The smallest class-conditional model on the embedded digits in which things can go wrong; seconds to compile."""
    c = config.base()
    c.compilation_cache = "off"
    c.data.image_size, c.data.channels = 32, 1
    c.codec.name, c.codec.patch = "pixel", 4
    c.model.width, c.model.heads, c.model.mlp_width = 16, 2, 24
    c.model.depth, c.model.diffusion_depth = 3, 1
    c.model.blocks = 4
    c.model.unet_channels, c.model.unet_attention = (8,), (True,)
    c.model.unet_layers, c.model.unet_time_width = 1, 8
    c.model.unet_groups = c.model.unet_heads = 4
    c.model.classes = 10
    c.train.batch, c.train.steps = 8, 6
    c.train.log_every, c.train.checkpoint_every, c.train.keep = 2, 2, 5
    c.optimizer.learning_rate = 1e-3
    c.mesh.data = 1
    c.sample.n, c.sample.batch, c.sample.steps, c.sample.guidance = 5, 4, 2, 1.5
    return c


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Reads a file of tests/reference: arrays of the public PyTorch implementations (README there)."""
    folder = pathlib.Path(__file__).parent / "reference"

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text()) if name.endswith(".json") else np.load(folder / name)

    return read
