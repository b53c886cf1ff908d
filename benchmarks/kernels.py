"""Counts the scheduled cycles of the TPU attention kernels at the shape of FFHQ-1024.

    python -m benchmarks.kernels v5e:2x2

The text of a compiled program has no estimate for a kernel, but libtpu dumps its schedule
instruction by instruction. A line of it takes at least one cycle, and more if it waits for memory.
`cost.tpu_time.KERNEL_COSTS` holds the results. It needs libtpu but no TPU, and takes a minute.
"""

import os
import pathlib
import re
import sys
import tempfile
from typing import Any

FOLDER = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={FOLDER.name} --xla_jf_dump_llo_text=true"  # libtpu reads this when it is loaded
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from madformer_jax.cost import flops, topologies, tpu_time  # noqa: E402
from madformer_jax.ops.attention import pallas_tpu, pallas_tpu_kernels  # noqa: E402
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK  # noqa: E402
from madformer_jax.ops.rope import RotaryTable  # noqa: E402

BLOCKS, TOKENS, HEADS, SIZE = 16, 256, 18, 64
KERNELS = {"forward": 2, "backward": 5}  # matrix products of each query and key
JUMPS = 4  # longest run of lines without the loop's marks inside one loop


def cycles(schedule: str) -> tuple[int, list[int]]:
    """Counts the lines of a schedule in the loop over the grid, and in each loop within it.

    The number of `>` marks of a line is its depth.
    """
    depths = [
        len(marks) for marks in re.findall(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)", schedule, re.MULTILINE)
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

    def total(q: Any, self_kv: Any, context: Any) -> Any:
        return jnp.sum(
            pallas_tpu.block_attention(
                q, self_kv, context, None, None, pallas_tpu.KernelSizes(1, TOKENS, 0, False)
            ).astype(jnp.float32)
        )

    shapes = projected(BLOCKS), *((projected(n), rows(n)) for n in (BLOCKS, BLOCKS - 1))
    jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
    for name, products in KERNELS.items():
        (path,) = pathlib.Path(FOLDER.name).glob(f"*block_attention_{name}*[0-9]-final_bundles.txt")
        step, loops = cycles(path.read_text())
        # One loop per factor of UNROLL_FACTORS, the longest first. Others run once over the keys.
        start = loops.index(max(loops))
        groups = dict(zip(pallas_tpu_kernels.UNROLL_FACTORS, loops[start:]))
        others = sum(loops) - sum(groups.values())
        total_cycles = BLOCKS * step + (BLOCKS - 1) * others
        for tiles in range(BLOCKS):  # context tiles of a block; its own tile is part of the step
            for size, lines in groups.items():
                total_cycles += tiles // size * lines
                tiles %= size
        work = 2 * products * SIZE * TOKENS**2 * BLOCKS * (BLOCKS + 1) / 2
        print(
            f"{name:<10}{step:6} cycles per step of the grid, {groups} by unrolled tiles, {others} once per tile of keys; "
            f"{HEADS * total_cycles / chip.clock * 1e3:.2f} ms for "
            f"{HEADS} heads of {SIZE}, {work / peak / (total_cycles / chip.clock):.1%} of the peak"
        )


if __name__ == "__main__":
    main(sys.argv[1])
