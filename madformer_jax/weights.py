"""Checkpoint files of other frameworks as plain numpy: safe reading, atomic writing, and the check that all tensors fit."""

from collections.abc import Mapping

import numpy as np

from madformer_jax.config import ConfigError


def check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray], what: str) -> None:
    """Checks that `given` holds exactly the tensors of `expected`; `what` names the file or the model in the error.

    Raises:
      ConfigError: names every missing, extra and mis-shaped tensor.
    """
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshaped = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names)})"
        for kind, names in (("missing", missing), ("extra", extra), ("mis-shaped", misshaped))
        if names
    ]
    if faults:
        raise ConfigError(f"{what}: the tensors do not fit the model: {'; '.join(faults)}.")
