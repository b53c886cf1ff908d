"""Entry point of `python -m madformer_jax` and of the command `madformer`, which runs main.py."""

import runpy


def main() -> None:
    """Runs the command line of this process and exits."""
    runpy.run_module("madformer_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
