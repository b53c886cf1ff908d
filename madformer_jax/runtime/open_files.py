"""The system's limit on the number of files that a process holds open (`ulimit -n`)."""

import resource

from madformer_jax.errors import ConfigError

MIN_LIMIT = (
    64  # below, a run ends in an error of some library: JAX, Orbax and the standard streams take about half of these
)


def limit() -> int:
    """Returns how many files this process may hold open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """Raises the limit as far as the system lets a user.

    Raises:
      ConfigError: This is still not enough to run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if limit() < MIN_LIMIT:
        raise ConfigError(
            f"this process may hold {limit()} files open, and needs {MIN_LIMIT} at least: ulimit -n 1024."
        )


def reader_limit(most: int) -> int:
    """Returns how many files one reader may hold open: `most`, or less if the limit is low and others need the rest."""
    return max(1, min(most, limit() // 2 - MIN_LIMIT // 4))
