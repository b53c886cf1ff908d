"""Fields of a config: defaults, allowed values, and effects on a run.

Config files start from `base` here, and may call `variant` and `as_tiny`; modules of the package use `schema`.
"""

from ml_collections import ConfigDict

from madformer_jax.config import aliases, schema
from madformer_jax.config.schema import as_tiny, variant

__all__ = ["as_tiny", "base", "variant"]


def base() -> ConfigDict:
    """Returns a config with every field at its default, which also knows the former names of renamed fields."""
    return aliases.accept_in_config_file(schema.base())
