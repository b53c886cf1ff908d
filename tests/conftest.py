"""Eight virtual CPU devices for every test, so that meshes can be tested on one machine; programs compiled quickly, not well."""

import atexit
import json
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Callable
from typing import Any

from madformer_jax.runtime import malloc, xla_flags
from tests import QUICK

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
if "PYTEST_XDIST_WORKER" not in os.environ:  # its workers inherit it
    # Programs that several tests, or processes of one, run are compiled once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="madformer-tests-")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # other threads would wait for small matrices in a busy loop
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"  # reading a smaller program takes as long

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook
from ml_collections import ConfigDict

from tests import tiny

# Types and shapes of all calls in these packages are checked. No module above imports one of them.
install_import_hook(
    [f"madformer_jax.{name}" for name in ("diffusion", "models", "ops", "sampling.codec")], "tests.typecheck"
)

# A shell starts a background command with SIGINT ignored, and nohup with SIGHUP: processes of the tests would inherit it.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

malloc.trim = lambda: None  # Small programs would give memory back all the time.

jax.devices()  # JAX reads the flags here, libtpu when a test loads it
os.environ["XLA_FLAGS"] = xla_flags.supported(os.environ["XLA_FLAGS"])

if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# the longest: none is to be left for the end
_FIRST = (
    "test_commands.py",
    "test_distributed.py",
    "test_cloud.py",
    "test_kill.py",
    "test_train_step.py",
    "test_fuzz.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else len(_FIRST))


@pytest.fixture
def tiny_config() -> ConfigDict:
    """See `tests.tiny`."""
    return tiny.get_config()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh of the first device only, as on a plain CPU."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *a: devices)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Reads a file of tests/reference: arrays of the public PyTorch implementations (README there)."""
    folder = pathlib.Path(__file__).parent / "reference"

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text()) if name.endswith(".json") else np.load(folder / name)

    return read


_abstract_states: dict[Any, Any] = {}


@pytest.fixture
def random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the initial state of every seed by random numbers, because its program takes seconds to compile.

    The shapes of a model's state are traced once.
    """
    from madformer_jax.training import train_step

    real = train_step.create_state

    def create_state(model: Any, tx: Any, seed: int, mesh: Any, power_ema: bool = False) -> Any:
        key = model, jax.tree.structure(tx.init({"w": np.zeros(1, np.float32)})), mesh, power_ema
        if key not in _abstract_states:
            _abstract_states[key] = real(model, tx, seed, mesh, power_ema)[1]
        abstract = _abstract_states[key]

        def create() -> train_step.State:
            rng = np.random.default_rng(0)
            params = jax.tree.map(lambda a: 0.1 * rng.standard_normal(a.shape, np.float32), abstract.params)
            state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)._replace(params=params, ema=params)
            return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)

        return create, abstract

    monkeypatch.setattr(train_step, "create_state", create_state)
