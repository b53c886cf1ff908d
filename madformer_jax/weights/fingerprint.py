"""What weights are, as a short text: the same for the same values, wherever they lie and over however many devices."""

import hashlib
from typing import Any

import jax
import numpy as np

from madformer_jax.runtime import partitioning


def fingerprint(params: Any, mesh: jax.sharding.Mesh | None = None) -> str:
    """Sixteen hex digits of the SHA-256 of a tree's names, shapes and values; one array at a time comes to the host.

    Without a mesh every process holds the whole tree.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        values = np.ascontiguousarray(leaf if mesh is None else partitioning.to_host(leaf, mesh))
        digest.update(f"{jax.tree_util.keystr(path)} {values.shape} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
