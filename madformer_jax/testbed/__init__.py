"""Deprecated name of `madformer_jax.sweeps.sweep_file`, kept for one release for sweep files of users.

`from madformer_jax.testbed.sweep import Sweep` works and logs one warning.
"""

import sys

from absl import logging

from madformer_jax.sweeps import sweep_file as sweep

sys.modules[f"{__name__}.sweep"] = sweep
logging.warning("madformer_jax.testbed.sweep is deprecated: import from madformer_jax.sweeps.sweep_file instead.")
