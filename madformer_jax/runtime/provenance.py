"""Record of the config files that runs of this user have written.

A workdir may come from a stranger. `runtime.stored_config` takes paths from a config.json only if this
record contains it. The record is a folder with one empty file per config, named by a hash of its content.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from madformer_jax.runtime import storage


def record(content: Mapping[str, Any]) -> None:
    """Records a config that a run of this user has written.

    Nothing is recorded if the cache is not writable.
    """
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
