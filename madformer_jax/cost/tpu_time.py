"""How long a TPU takes for a compiled program, by the compiler's own cost model, and where the time goes.

    python -m madformer_jax.cost.tpu_time BEFORE.json AFTER.json

compares two files that --mode=compile wrote. It is an estimate (docs/performance.md): each instruction's cycles times its loops'
trip counts over the clock; kernels of attention, which have none, by their FLOPs and queries, as their schedule has it; data moved
between chips by its bytes.
"""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.config import aliases, fields
from madformer_jax.cost import hlo
from madformer_jax.errors import ConfigError, first_line

KINDS = ("products", "element-wise", "copies", "collectives")
PHASES = ("forward", "recomputed", "backward", "update")
COSTLIEST_COUNT = 10

_SecondsTable = Mapping[str, Mapping[str, float]]  # seconds by part and kind or phase


class ChipSpec(NamedTuple):
    """What cycles and bytes of a generation take."""

    clock: float  # Hz, at which its multipliers reach the peak of the data sheet
    link: float  # bytes/s out of a chip over all its links


# Part of `device_kind` -> chip; the first that fits counts. The clock is the peak of the data sheet over what the units that the
# cost model counts multiply in a cycle (on v4 one core's for a chip of two); a product of 4096 or 8192 is then given 87 to 96 %
# of the peak (`python -m benchmarks.calibration`). The links are the data sheets' (1600 Gbit/s on v5e), one way.
CHIP_SPECS: tuple[tuple[str, ChipSpec], ...] = (
    ("TPU v4", ChipSpec(2.1e9, 300e9)),
    ("TPU v5 lite", ChipSpec(1.5e9, 200e9)),
    ("TPU v5", ChipSpec(1.75e9, 600e9)),  # v5p
    ("TPU v6", ChipSpec(1.75e9, 400e9)),
)


class KernelCost(NamedTuple):
    """What a kernel of attention takes on a TPU, by the compiler's schedule of it."""

    rate: float  # share of the peak that its FLOPs run at
    query: float  # cycles that a query of a head takes besides


# By name, for heads of 64, which leave half of a multiplier empty in the products over them, and tiles of 256: from what
# `python -m benchmarks.kernels` prints for 16 and for 4 blocks.
KERNEL_COSTS = {"block_attention_forward": KernelCost(0.52, 2.2), "block_attention_backward": KernelCost(0.75, 4.5)}


class InstructionTime(NamedTuple):
    """One instruction, over all the times that it runs."""

    name: str
    part: str
    kind: str
    phase: str
    seconds: float
    times: float
    place: str  # file:line of our source, and JAX's name of the operation


class Estimate(NamedTuple):
    """Of one call of a program, on one device."""

    rows: list[InstructionTime]
    waiting: float  # seconds of collectives during which nothing else can run
    overlapping: float  # seconds of those that other instructions can hide
    useful: float  # seconds that its analytic FLOPs take at the peak
    unknown: list[str]  # kernels of which nothing is known, left out; loops of which the trips are not, counted once
    crossing: float = 0.0  # bytes to other slices, whose time is no part of all this

    @property
    def busy(self) -> float:
        """Seconds of computing."""
        return math.fsum(row.seconds for row in self.rows if row.kind != "collectives")

    @property
    def low(self) -> float:
        """Seconds if all that can overlap does."""
        return self.waiting + max(self.busy, self.overlapping)

    @property
    def high(self) -> float:
        """Seconds if nothing overlaps."""
        return self.waiting + self.busy + self.overlapping

    def table(self, column: str) -> dict[str, dict[str, float]]:
        """Seconds by part and by `column`, kind or phase."""
        cells: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in self.rows:
            cells[row.part][getattr(row, column)] += row.seconds
        return {part: dict(found) for part, found in sorted(cells.items(), key=lambda x: -sum(x[1].values()))}

    def figures(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        costliest = sorted(self.rows, key=lambda row: -row.seconds)[:COSTLIEST_COUNT]
        return {
            "busy": self.busy, "low": self.low, "high": self.high, "waiting": self.waiting,
            "overlapping": self.overlapping, "share_of_peak": self.useful / self.busy if self.busy else 0.0,
            "kinds": self.table("kind"), "phases": self.table("phase"),
            "costliest": [row._asdict() for row in costliest], "unknown": self.unknown, "crossing": self.crossing,
        }  # fmt: skip


def chip_spec(device_kind: str) -> ChipSpec | None:
    """Figures of a kind of device; None where there are none."""
    return next((found for kind, found in CHIP_SPECS if kind in device_kind), None)


def estimate(text: str, device_kind: str, peak: float, flops: float) -> Estimate:
    """Of a program's text, compiled at the level of a run.

    Args:
      device_kind, peak: of the device, FLOP/s.
      flops: analytic, of one device.

    Raises:
      ValueError: `chip` knows none of this kind.
    """
    of = chip_spec(device_kind)
    if of is None:
        raise ValueError(f"no clock is known for {device_kind}")
    program = hlo.parse(text)
    rows, unknown, crossing = [], hlo.unbounded_loops(program), 0.0
    moving = {True: 0.0, False: 0.0}  # by whether it can overlap
    for run in hlo.executions(program):
        one, cycles = run.instruction, run.instruction.cycles
        crossing += hlo.inter_slice_bytes(run)
        names = model_component(one.op_name), phase(one.op_name)
        place = f"{program.places.get(one.frame, '?')} {'/'.join(one.op_name.split('/')[-2:])}".strip()
        if move := hlo.collective(program, run):
            seconds = move.moved * (2 if one.opcode.startswith("all-reduce") else 1) / of.link
            moving[move.overlaps or cycles is not None] += seconds
            rows.append(InstructionTime(one.name, names[0], "collectives", names[1], seconds, run.times, place))
        if cycles is not None:
            rows.append(
                InstructionTime(
                    one.name,
                    names[0],
                    instruction_kind(program, one),
                    names[1],
                    run.times * cycles / of.clock,
                    run.times,
                    place,
                )
            )
        elif one.opcode == "custom-call" and "tpu_custom_call" in one.rest:
            kernel = next((kernel for name, kernel in KERNEL_COSTS.items() if name in one.op_name), None)
            work = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.rest)
            if kernel is None or work is None:
                unknown.append(one.name)
            else:
                *heads, _, queries = hlo.array_dimensions(one.shape)[0]
                besides = math.prod(heads) * queries * kernel.query / of.clock
                seconds = run.times * (int(work[1]) / (kernel.rate * peak) + besides)
                rows.append(InstructionTime(one.name, "attention", "products", names[1], seconds, run.times, place))
    return Estimate(rows, moving[False], moving[True], flops / peak, unknown, crossing)


def model_component(op_name: str) -> str:
    """The part of the model or of the step that an operation belongs to."""
    if "downsampler" in op_name or "upsampler" in op_name:
        return "U-Net"
    if re.search(r"\battention\b", op_name):
        return "attention"
    known = ("ar_layers", "diffusion_layers", "optimizer", "codec", "text_head", "embedding")
    named = {"ar_layers": "AR layers", "diffusion_layers": "diffusion layers", "codec": "VAE"}
    found = next((name for name in known if name in op_name), "")
    return named.get(found, found) or ("loss" if "jvp" in op_name else "rest")


def phase(op_name: str) -> str:
    """Forward, backward, forward again for the backward pass, or what is no part of a gradient."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "update" if "optimizer" in op_name else "forward"


_COPY_OPCODES = {
    "bitcast", "broadcast", "concatenate", "constant", "copy", "copy-start", "copy-done", "dynamic-slice",
    "dynamic-update-slice", "fusion", "gather", "get-tuple-element", "iota", "pad", "parameter", "reshape", "reverse", "slice",
    "transpose", "tuple",
}  # fmt: skip


def instruction_kind(program: hlo.Program, instruction: hlo.Instruction) -> str:
    """Of KINDS, but not collectives; a product fused with element-wise work is a product, a conversion is element-wise."""
    opcodes = {x.opcode for x in (instruction, *program.inner(instruction))}
    if opcodes & {"convolution", "dot"}:
        return "products"
    return "copies" if opcodes <= _COPY_OPCODES else "element-wise"


# ---- reports


def format_estimate(e: Estimate) -> str:
    """The estimate, as the lines of a report."""
    f = e.figures()
    lines = [
        f"  {'time, estimated':<24}{e.busy:9.3f} s a device computes, {f['share_of_peak']:.0%} of the peak",
        f"  {'with collectives':<24}{e.low:9.3f} to {e.high:.3f} s: {e.waiting:.3f} s of them wait, "
        f"{e.overlapping:.3f} s may overlap",
        f"  {'ms':<24}" + "".join(f"{name:>14}" for name in (*KINDS, *PHASES)),
    ]
    for name, cells in f["kinds"].items():
        columns = [cells.get(x, 0.0) for x in KINDS] + [f["phases"][name].get(x, 0.0) for x in PHASES]
        lines.append(f"  {name:<24}" + "".join(f"{1e3 * x:14.2f}" for x in columns))
    lines.append("  costliest, ms, times")
    lines += [
        f"  {1e3 * row['seconds']:9.2f} {row['times']:6.0f}  {row['part']}, {row['phase']}, {row['kind']}: {row['place']}"
        for row in f["costliest"]
    ]
    if e.unknown:
        lines.append(f"  left out, or loops counted once, as nothing is known of them: {', '.join(e.unknown)}")
    if e.crossing:
        lines.append(
            f"  to other slices         {e.crossing / 2**30:9.3f} GiB a device, in a time that is not estimated"
        )
    return "\n".join(lines)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What changed between two files of --mode=compile: settings, and of each program memory, seconds, and parts, largest first.

    Raises:
      KeyError: a file lacks a figure.
    """
    settings = [
        {"topology": f["topology"]} | aliases.current_names(fields.flat(f["config"]), "a stored config")
        for f in (before, after)
    ]
    lines = [
        f"{name}: {settings[0].get(name)!r} -> {settings[1].get(name)!r}"
        for name in dict.fromkeys([*settings[0], *settings[1]])
        if settings[0].get(name) != settings[1].get(name)
    ]
    for name in before:
        old, new = (f[name].get("time") if isinstance(f.get(name), dict) else None for f in (before, after))
        if not old or not new:
            continue
        lines.append(f"{name:<36}{'before':>10}{'after':>10}")
        gib = (f"{f[name]['bytes'] / 2**30:10.2f}" for f in (before, after))
        lines.append(f"  {'GiB a device':<34}{''.join(gib)}")
        lines.append(f"  {'share of the peak':<34}{old['share_of_peak']:10.1%}{new['share_of_peak']:10.1%}")
        lines += [f"  {f'{total}, s':<34}{old[total]:10.3f}{new[total]:10.3f}" for total in ("busy", "low", "high")]
        for table in ("kinds", "phases"):
            lines += [f"  {cell:<34}{x:10.3f}{y:10.3f}" for cell, x, y in _changed_cells(old[table], new[table])]
    return "\n".join(lines) or "nothing differs, and no program has its time in both files."


def _changed_cells(old: _SecondsTable, new: _SecondsTable) -> list[tuple[str, float, float]]:
    """The cells of two tables that differ, most of all first."""
    names = dict.fromkeys((part, column) for table in (old, new) for part, row in table.items() for column in row)
    cells = [
        (f"{part}, {column}", old.get(part, {}).get(column, 0.0), new.get(part, {}).get(column, 0.0))
        for part, column in names
    ]
    return sorted((cell for cell in cells if cell[1] != cell[2]), key=lambda cell: -abs(cell[2] - cell[1]))


def _read_report(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}): name two files of --mode=compile.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no file of --mode=compile.")
    return found


def main(argv: Sequence[str]) -> int:
    try:
        if len(argv) != 2:
            raise ConfigError("two files are compared: python -m madformer_jax.cost.tpu_time BEFORE.json AFTER.json")
        before, after = map(_read_report, argv)
        try:
            print(compare(before, after))
        except KeyError as error:
            raise ConfigError(
                f"{' or '.join(argv)} lacks {error}: write both by --mode=compile of one version."
            ) from None
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
