"""A record of the config files that this user's own runs have written.

A workdir may come from a stranger. `config.restored` takes paths from the config.json of a folder only if that file is in the record:
the same values were written here before. The record holds one empty file per config, named by a hash of its content.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from madformer_jax.runtime import storage


def record(content: Mapping[str, Any]) -> None:
    """Notes that a run of this user has written a config. Without a cache that can be written, nothing is noted."""
    path = _path(content)
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab"):
            pass


def is_recorded(content: Mapping[str, Any]) -> bool:
    """Returns whether a run of this user has written this config."""
    return os.path.exists(_path(content))


def _path(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return os.path.join(storage.user_cache("configs"), digest)
