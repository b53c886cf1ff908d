"""Compares the compiler's time estimates for a TPU with the data sheet.

    python -m benchmarks.calibration v5e:2x2

compiles five matrix products and two convolutions of known size for the topology. It prints the
estimated time of each and its share of the peak (docs/engineering_log.md). It needs libtpu but no TPU,
and takes a minute.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from madformer_jax.cost import flops, topologies, tpu_time

PRODUCTS = ((1024, 4096, 4096), (8192, 8192, 8192), (4096, 1152, 4096), (4096, 4096, 1152), (65536, 1152, 1152))
CONVOLUTIONS = ((64, 32, 512, 512), (64, 16, 1152, 512))  # batch, side, channels, features; 3 x 3


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def main(topology: str) -> None:
    device = topologies.topology_devices(topology)[0]
    sharding, peak = jax.sharding.SingleDeviceSharding(device), flops.peak_rate("bfloat16", device)

    def show(name: str, function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], work: float) -> None:
        args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        text = jax.jit(function).lower(*args).compile().as_text()
        e = tpu_time.estimate(text, device.device_kind, peak, work)
        kinds = {kind: 1e3 * sum(row.seconds for row in e.rows if row.kind == kind) for kind in tpu_time.KINDS}
        by_kind = ", ".join(f"{kind} {ms:.3f}" for kind, ms in kinds.items() if ms)
        print(f"{name:<40}{1e3 * e.busy:8.3f} ms ({by_kind}){work / peak / e.busy:7.1%} of the peak", flush=True)

    for m, k, n in PRODUCTS:
        show(f"product {m} x {k} x {n}", jnp.matmul, ((m, k), (k, n)), 2.0 * m * k * n)
    for b, side, c, f in CONVOLUTIONS:
        work = 2.0 * b * side**2 * 9 * c * f
        show(f"3 x 3 convolution {b}, {side}, {c} to {f}", convolution, ((b, side, side, c), (3, 3, c, f)), work)


if __name__ == "__main__":
    main(sys.argv[1])
