"""Deprecated alias of `madformer_jax.sweeps.sweep_file` for sweep files of users; warns when imported.

Remove it, with the package, after one release.
"""

from absl import logging

from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid

__all__ = ["Sweep", "config_beside", "grid"]

logging.warning("madformer_jax.testbed.sweep is deprecated: import from madformer_jax.sweeps.sweep_file instead.")
