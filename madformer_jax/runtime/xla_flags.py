"""XLA flags that the installed libraries know. XLA ends a process whose XLA_FLAGS has an unknown flag."""

import glob
import importlib.util
import mmap
import os
from collections.abc import Iterable

# Packages whose library reads XLA_FLAGS, and the name of the library.
LIBRARIES = {"jaxlib": "*jax_common*", "libtpu": "libtpu.so"}


def supported(flags: str, packages: Iterable[str] = tuple(LIBRARIES)) -> str:
    """Returns those of the flags, which spaces separate, that the library of each installed package knows.

    Returns no flag if none of the packages is installed.
    """
    paths = [path for package in packages for path in _libraries(package)]
    return " ".join(flag for flag in flags.split() if paths and all(_contains_flag(path, flag) for path in paths))


def _libraries(package: str) -> list[str]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # data workers hide JAX (data/worker.py)
        spec = None
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [path for folder in folders for path in glob.glob(os.path.join(folder, LIBRARIES[package]))]


def _contains_flag(path: str, flag: str) -> bool:
    """Returns whether a library contains the name of a flag as a string, not as a removed protocol-buffer field."""
    name = flag.removeprefix("--").partition("=")[0]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(f"\0{name}\0".encode()) >= 0
