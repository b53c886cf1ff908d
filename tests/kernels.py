"""What the kernels of attention take on a TPU: cycles of the compiler's own schedule, at FFHQ-1024's shape.

    python -m tests.kernels v5e:2x2

A kernel has no estimate in a compiled program's text, but libtpu writes down its schedule, instruction by instruction: a line of it
takes a cycle at least, what waits for memory more. It needs libtpu, no TPU, and a minute.
"""

import os
import pathlib
import re
import sys
import tempfile
from typing import Any

FOLDER = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={FOLDER.name} --xla_jf_dump_llo_text=true"  # read as libtpu is loaded
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from madformer_jax import aot, estimate, flops  # noqa: E402
from madformer_jax.models import pallas  # noqa: E402

BLOCKS, TOKENS, HEADS, SIZE = 16, 256, 18, 64
KERNELS = {"forward": 2, "backward": 5}  # and the products that it takes of each query and key


def cycles(schedule: str) -> tuple[int, int]:
    """Lines of a schedule in the loop over the grid, and in the loop over tiles within it; the marks > tell the depth."""
    depths = [
        len(found) for found in re.findall(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)", schedule, re.MULTILINE)
    ]
    return depths.count(1), depths.count(2)


def main(topology: str) -> None:
    device = aot.describe(topology)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    chip, peak = estimate.chip(device.device_kind), flops.peak("bfloat16", device)
    assert chip is not None

    def rows(blocks: int) -> Any:
        return jax.ShapeDtypeStruct((1, HEADS, SIZE, blocks * TOKENS), jnp.bfloat16, sharding=sharding)

    def total(q: Any, own: Any, context: Any) -> Any:
        return jnp.sum(pallas.attend(q, own, context, None, None, 1, TOKENS, False).astype(jnp.float32))

    shapes = rows(BLOCKS), (rows(BLOCKS),) * 2, (rows(BLOCKS - 1),) * 2
    jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
    for name, products in KERNELS.items():
        (path,) = pathlib.Path(FOLDER.name).glob(f"*block_attention_{name}*[0-9]-final_bundles.txt")
        step, tile = cycles(path.read_text())
        whole = BLOCKS * step + BLOCKS * (BLOCKS - 1) // 2 * tile  # the first tile, a block's own, is in the step
        work = 2 * products * SIZE * TOKENS**2 * BLOCKS * (BLOCKS + 1) / 2
        print(
            f"{name:<10}{step:6} cycles a step of the grid, {tile} a tile; {HEADS * whole / chip.clock * 1e3:.2f} ms for "
            f"{HEADS} heads of {SIZE}, {work / peak / (whole / chip.clock):.1%} of the peak"
        )


if __name__ == "__main__":
    main(sys.argv[1])
