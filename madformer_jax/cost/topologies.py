"""Devices to compile for on a machine that does not have them.

libtpu describes TPU topologies and JAX's CUDA plugin describes GPUs. `--mode=compile` and the
programs in benchmarks/ use them. Add a GPU of compute capability 9.0 to `_GPUS`.
"""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from madformer_jax.errors import ConfigError, first_line


class _Gpu(NamedTuple):
    """Properties of a GPU from NVIDIA's data sheet."""

    name: str
    memory: int  # bytes
    bandwidth: int  # bytes/s


# By the name of a topology, such as h100, or h100:8 for 8 GPUs in one host.
_GPUS = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 84_929_347_584, 3_352_320_000_000),
    "h200": _Gpu("NVIDIA H200", 150_754_820_096, 4_800_000_000_000),
}
# The properties that XLA queries. All but those of `_Gpu` are limits of compute capability 9.0.
_TARGET_CONFIG = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{gpu.name}"
"""
_DEFAULT_MEMORY_FRACTION = 0.75  # share of the device memory that JAX allocates


def platform(topology: str) -> str:
    """Returns the platform of a topology: "gpu" or "tpu"."""
    return "gpu" if _gpu_name(topology) in _GPUS else "tpu"


def _gpu_name(topology: str) -> str:
    return topology.partition(":")[0]


def gpu_memory_bytes(topology: str) -> int:
    """Returns the bytes of a GPU of a topology that JAX allocates.

    The environment variable XLA_PYTHON_CLIENT_MEM_FRACTION changes the share from its default 0.75.

    Raises:
      ConfigError: The variable is not a number.
    """
    fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _DEFAULT_MEMORY_FRACTION)
    try:
        return int(_GPUS[_gpu_name(topology)].memory * float(fraction))
    except ValueError:
        raise ConfigError(f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} must be a number, such as 0.9.") from None


def topology_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, to compile for.

    Args:
      topology: For example v5e:4x4, v5e:4x4@2 (two slices of it), v5p:2x2x1, h100:8 or h200.

    Raises:
      ConfigError: The compiler for the platform is not installed, or does not know the topology.
    """
    if not topology:
        raise ConfigError("--mode=compile needs --topology, for example --topology=v5e:4x4.")
    jax.config.update("jax_platforms", "cpu")  # keeps JAX from using the devices of this machine
    return _gpu_devices(topology) if platform(topology) == "gpu" else _tpu_devices(topology)


def _tpu_devices(topology: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--mode=compile needs libtpu, with or without a TPU: pip install 'libtpu>=0.0.42,<0.1' (Linux only)."
        )
    # Keeps libtpu from looking for chips of this machine.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # allows concurrent compilations, none of which uses a chip
    }.items():
        os.environ.setdefault(name, value)
    name, _, slices = topology.partition("@")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=int(slices or 1))
        return list(description.devices)
    except Exception as error:  # XLA, libtpu and the loader raise different types
        raise ConfigError(
            f"libtpu cannot compile for --topology={topology} ({first_line(error)}). Use a topology such as v5e:4x4, "
            "v6e:2x2 or v5p:2x2x1, v5e:4x4@2 for two slices, or h100, h200 or h100:8 for GPUs."
        ) from None


def _gpu_devices(topology: str) -> list[jax.Device]:
    name, count = _gpu_name(topology), topology.partition(":")[2] or "1"
    if not count.isdecimal() or not 1 <= int(count) <= 8:
        raise ConfigError(
            f"--topology={topology} does not name 1 to 8 GPUs. Use {name} for one, or {name}:2 to {name}:8 for several in "
            "one host."
        )
    if importlib.util.find_spec("jax_plugins") is None:
        raise ConfigError(
            f"--topology={topology} needs JAX's CUDA plugin, with or without a GPU: pip install 'jax[cuda13]' (Linux only)."
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the check needs a driver
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=_TARGET_CONFIG.format(gpu=_GPUS[name]), topology=f"1x1x{count}"
        )
        return list(description.devices)
    except Exception as error:  # XLA, the plugin and the loader raise different types
        raise ConfigError(
            f"JAX's CUDA plugin cannot compile for --topology={topology} ({first_line(error)})."
        ) from None
