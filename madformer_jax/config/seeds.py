"""The seeds of a run: `config.seed`, and those of `config.seeds` for single sources of randomness."""

from ml_collections import ConfigDict


def of(c: ConfigDict, source: str) -> int:
    """Returns the seed of a source of randomness.

    Args:
      c: The config.
      source: "init", initial weights; "data", order of the data and noise of training and validation;
        or "sample", noise and labels of samples.

    Returns:
      `config.seeds.<source>`, or `config.seed` where that is -1.
    """
    seed = c.seeds[source]
    return c.seed if seed < 0 else seed
