"""JAX settings that all programs of this package are traced and run with.

Optax and Flax fail under some settings, such as strict dtype promotion, and others would change the
numbers. So the package sets them itself: the command line calls `apply_globally`, and functions for
Python callers use `scope` or `scoped`.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import jax
from absl import logging

P = ParamSpec("P")
R = TypeVar("R")

SETTINGS = {
    "jax_enable_x64": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_debug_nans": False,  # the logged loss of a quarter of the timesteps is NaN if no block falls into it
    "jax_debug_infs": False,  # masked scores of attention are minus infinity
    "jax_transfer_guard": "allow",
}


def apply_globally() -> None:
    """Sets `SETTINGS` for all threads of this process and logs those that the user had changed."""
    for name, value in SETTINGS.items():
        before = getattr(jax.config, name)
        if before not in (value, None):
            logging.warning("%s=%s is not supported: %s is used", name.upper(), before, value)
        jax.config.update(name, value)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Sets `SETTINGS` for the calling thread until the context ends."""
    with contextlib.ExitStack() as stack:
        for name, value in SETTINGS.items():
            stack.enter_context(getattr(jax, name.removeprefix("jax_"))(value))
        yield


def scoped(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function as one that runs in `scope`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with scope():
            return function(*args, **kwargs)

    return run
