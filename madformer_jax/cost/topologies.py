"""Devices to compile for on a machine that has none: TPU topologies by libtpu, H100s by JAX's plugin for CUDA."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from madformer_jax.errors import ConfigError, first_line

H100 = "h100"  # and h100:8, so many in one host
# What XLA asks a GPU about: NVIDIA's data sheet and the limits of compute capability 9.0.
_H100_TARGET_CONFIG = """\
gpu_device_info {
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
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_H100_BYTES = 84_929_347_584  # bytes of an H100
_DEFAULT_MEMORY_FRACTION = 0.75  # of it that JAX takes


def platform(topology: str) -> str:
    """What kind of device a topology is of: "gpu" or "tpu"."""
    return "gpu" if topology.partition(":")[0] == H100 else "tpu"


def gpu_memory_bytes() -> int:
    """Bytes of an H100 that JAX takes for itself: three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
    return int(_H100_BYTES * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _DEFAULT_MEMORY_FRACTION)))


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as v5e:4x4, v5e:4x4@2 (two slices of it), v5p:2x2x1 or h100:8, to compile for.

    Raises:
      ConfigError: what compiles for it is missing, or does not know it.
    """
    if not topology:
        raise ConfigError("--mode=compile needs --topology, for example --topology=v5e:4x4.")
    jax.config.update("jax_platforms", "cpu")  # JAX is not to take the machine's own
    return _gpu_devices(topology) if platform(topology) == "gpu" else _tpu_devices(topology)


def _tpu_devices(topology: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--mode=compile needs libtpu, TPU or not: pip install 'libtpu>=0.0.42,<0.1' (Linux only).")
    # libtpu is not to look for chips of this machine
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at a time: there are no chips to fight over
    }.items():
        os.environ.setdefault(name, value)
    name, _, slices = topology.partition("@")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=int(slices or 1))
        return list(found.devices)
    except Exception as error:  # of XLA, of libtpu or of the loader
        raise ConfigError(
            f"libtpu cannot compile for --topology={topology} ({first_line(error)}): topologies look like "
            "v5e:4x4, v6e:2x2 or v5p:2x2x1, with @2 for two slices of it, or h100:8 for GPUs."
        ) from None


def _gpu_devices(topology: str) -> list[jax.Device]:
    count = topology.partition(":")[2] or "1"
    if not count.isdecimal() or not 1 <= int(count) <= 8:
        raise ConfigError(f"--topology={topology}: h100 for one, or h100:2 to h100:8 for so many in one host.")
    if importlib.util.find_spec("jax_plugins") is None:
        raise ConfigError(
            "--topology=h100 needs JAX's plugin for CUDA, GPU or not: pip install 'jax[cuda13]' (Linux only)."
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which asks the driver, and there is none
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_H100_TARGET_CONFIG, topology=f"1x1x{count}"
        )
        return list(found.devices)
    except Exception as error:  # of XLA, of the plugin or of the loader
        raise ConfigError(
            f"JAX's plugin for CUDA cannot compile for --topology={topology} ({first_line(error)})."
        ) from None
