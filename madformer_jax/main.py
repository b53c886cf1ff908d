"""The program `python -m madformer_jax.main`. `cli.command_line` reads its flags and runs a mode."""

import signal
import sys

from madformer_jax.errors import leave
from madformer_jax.runtime import malloc

if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)  # while modules load, an exception would be lost or end in a traceback
    malloc.restart_with_tunables()
    from madformer_jax.cli import command_line

    sys.exit(command_line.main())
