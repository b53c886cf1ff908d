"""Fingerprints of weights: short texts that depend on the values alone, not on files or devices."""

import hashlib
from typing import Any

import jax
import numpy as np

from madformer_jax.runtime import partitioning


def fingerprint(params: Any, mesh: jax.sharding.Mesh | None = None) -> str:
    """Computes 16 hex digits of the SHA-256 of a tree's names, shapes and values.

    One array at a time is copied to the host.

    Args:
      params: Tree of arrays.
      mesh: Mesh over which the arrays are sharded; None if every process holds the whole tree.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        values = np.ascontiguousarray(leaf if mesh is None else partitioning.to_host(leaf, mesh))
        digest.update(f"{jax.tree_util.keystr(path)} {values.shape} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
