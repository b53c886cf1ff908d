"""Fields of a config: their defaults, what they may hold, and what they mean for a run.

Config files call `base` and `variant`; see `schema`.
"""

from madformer_jax.config.schema import as_tiny, base, variant

__all__ = ["as_tiny", "base", "variant"]
