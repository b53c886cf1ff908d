"""`python -m madformer_jax`, and the command `madformer`: main.py as the program."""

import runpy


def main() -> None:
    """Runs the command line of the process, and ends it."""
    runpy.run_module("madformer_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
