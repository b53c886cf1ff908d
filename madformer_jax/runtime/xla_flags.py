"""XLA flags that the installed libraries know, and the flag that a CPU needs.

XLA ends a process whose XLA_FLAGS has an unknown flag.
"""

import glob
import importlib.util
import mmap
import os
from collections.abc import Iterable

# Packages whose library reads XLA_FLAGS, and the name of the library.
LIBRARIES = {"jaxlib": "*jax_common*", "libtpu": "libtpu.so"}
YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_ACCELERATOR_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def supported(flags: str, packages: Iterable[str] = tuple(LIBRARIES)) -> str:
    """Returns the flags, separated by spaces, that the library of every installed package knows.

    Returns no flag if none of the packages is installed.
    """
    paths = [path for package in packages for path in _libraries(package)]
    return " ".join(flag for flag in flags.split() if paths and all(_contains_flag(path, flag) for path in paths))


def computes_on_cpu(platform: str) -> bool:
    """Returns whether JAX will use the CPU. `platform` is `config.platform`."""
    asked = platform or os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return asked == "cpu" if asked else not any(map(glob.glob, _ACCELERATOR_DEVICES))


def disable_ynnpack(platform: str) -> None:
    """Disables XLA's YNNPACK kernels on CPU, whose gradients of convolutions are six times slower (docs/engineering_log.md).

    With an accelerator the flag is useless. XLA ends a process that sets an unknown flag.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if computes_on_cpu(platform) and YNN_FLAG not in flags and (flag := supported(f"--{YNN_FLAG}=")):
        os.environ["XLA_FLAGS"] = f"{flag} {flags}"


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
