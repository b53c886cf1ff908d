"""Limit on the number of open files of a process (`ulimit -n`)."""

import resource

from madformer_jax.errors import ConfigError

MIN_LIMIT = 64  # JAX, Orbax and the standard streams need about half of these


def limit() -> int:
    """Returns how many files this process may hold open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """Raises the limit as far as the system lets a user.

    Raises:
      ConfigError: The limit is still below `MIN_LIMIT`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if limit() < MIN_LIMIT:
        raise ConfigError(
            f"this process may hold {limit()} files open, and needs {MIN_LIMIT} at least: ulimit -n 1024."
        )


def reader_limit(most: int) -> int:
    """Returns how many files one reader may hold open: `most`, or fewer if the limit is low."""
    return max(1, min(most, limit() // 2 - MIN_LIMIT // 4))
