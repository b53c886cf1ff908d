"""Entry point of `python -m madformer_jax.main`. `cli.command_line` reads the flags and runs a mode."""

import gc
import signal
import sys

from madformer_jax.errors import leave
from madformer_jax.runtime import malloc

if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)  # an exception while modules load would be lost or print a traceback
    malloc.restart_with_tunables()
    # Imports and tracing make many objects that live long. With the default thresholds, garbage
    # collection takes a tenth of a short run.
    gc.set_threshold(100_000, 50, 50)
    from madformer_jax.cli import command_line

    sys.exit(command_line.main())
