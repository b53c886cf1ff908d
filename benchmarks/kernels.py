"""What the kernels of attention take on a TPU: cycles of the compiler's own schedule, at FFHQ-1024's shape.

    python -m benchmarks.kernels v5e:2x2

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

from madformer_jax.cost import flops, topologies, tpu_time  # noqa: E402
from madformer_jax.ops.attention import pallas_tpu, pallas_tpu_kernels  # noqa: E402
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK  # noqa: E402
from madformer_jax.ops.rope import RotaryTable  # noqa: E402

BLOCKS, TOKENS, HEADS, SIZE = 16, 256, 18, 64
KERNELS = {"forward": 2, "backward": 5}  # and the products that it takes of each query and key
JUMPS = 4  # lines of a loop that stand without its marks, at most


def cycles(schedule: str) -> tuple[int, list[int]]:
    """Lines of a schedule in the loop over the grid, and in each loop within it; the marks > tell the depth."""
    depths = [
        len(found) for found in re.findall(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)", schedule, re.MULTILINE)
    ]
    loops, gap = [0], 0
    for depth in depths:
        if depth != 2:
            gap += 1
            continue
        if gap > JUMPS and loops[-1]:
            loops.append(0)
        loops[-1] += 1
        gap = 0
    return depths.count(1), loops


def main(topology: str) -> None:
    device = topologies.topology_devices(topology)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    chip, peak = tpu_time.chip_spec(device.device_kind), flops.peak_rate("bfloat16", device)
    assert chip is not None

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def rows(blocks: int) -> Any:
        return array(1, HEADS, SIZE, blocks * TOKENS, dtype=jnp.bfloat16)

    def projected(blocks: int) -> ProjectedQK:
        return ProjectedQK(rows(blocks), array(SIZE, 1), RotaryTable(*[array(SIZE, blocks * TOKENS)] * 2))

    def total(q: Any, own: Any, context: Any) -> Any:
        return jnp.sum(pallas_tpu.block_attention(q, own, context, None, None, 1, TOKENS, 0, False).astype(jnp.float32))

    shapes = projected(BLOCKS), *((projected(n), rows(n)) for n in (BLOCKS, BLOCKS - 1))
    jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
    for name, products in KERNELS.items():
        (path,) = pathlib.Path(FOLDER.name).glob(f"*block_attention_{name}*[0-9]-final_bundles.txt")
        step, loops = cycles(path.read_text())
        # a loop over groups of tiles for each size of them, the longest first; all others go once over the keys
        place = loops.index(max(loops))
        groups = dict(zip(pallas_tpu_kernels.UNROLL_FACTORS, loops[place:]))
        others = sum(loops) - sum(groups.values())
        whole = BLOCKS * step + (BLOCKS - 1) * others
        for seen in range(BLOCKS):  # tiles that a block sees, but its own, which is in the step
            for size, lines in groups.items():
                whole += seen // size * lines
                seen %= size
        work = 2 * products * SIZE * TOKENS**2 * BLOCKS * (BLOCKS + 1) / 2
        print(
            f"{name:<10}{step:6} cycles a step of the grid, {groups} for so many tiles at once, {others} a tile of keys once; "
            f"{HEADS * whole / chip.clock * 1e3:.2f} ms for "
            f"{HEADS} heads of {SIZE}, {work / peak / (whole / chip.clock):.1%} of the peak"
        )


if __name__ == "__main__":
    main(sys.argv[1])
