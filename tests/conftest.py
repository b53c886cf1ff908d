"""Eight virtual CPU devices for every test, so that meshes can be tested on one machine."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny


@pytest.fixture
def tiny_config() -> ConfigDict:
    """See `tests.tiny`."""
    return tiny.get_config()


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Reads a file of tests/reference: arrays of the public PyTorch implementations (README there)."""
    folder = pathlib.Path(__file__).parent / "reference"

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text()) if name.endswith(".json") else np.load(folder / name)

    return read
