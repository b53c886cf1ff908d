"""Time of a compiled program on a TPU, estimated by the compiler's own cost model.

    python -m madformer_jax.cost.tpu_time BEFORE.json AFTER.json

compares two reports of --mode=compile, which calls `estimate` for each of its programs.

The estimate (docs/performance.md) is the cycles of each instruction times the trip counts of its
loops, over the clock. Attention kernels have no cycles. Their time follows from their FLOPs and
queries at the rates of `KERNEL_COSTS`. Collectives take their bytes over the link rate. Add a TPU
generation to `CHIP_SPECS` and a kernel to `KERNEL_COSTS`.
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

_SecondsTable = Mapping[str, Mapping[str, float]]  # seconds by component, and by kind or phase


class ChipSpec(NamedTuple):
    """Clock and link rate of a TPU generation."""

    clock: float  # Hz at which the multipliers reach the peak of the data sheet
    link: float  # bytes/s out of a chip, over all its links


# Specs by part of `device_kind`. The first match counts. The clock is the peak of the data sheet over
# the products per cycle of the units that the cost model counts. On v4, these are the units of one
# of the two cores of a chip. A product of 4096 or 8192 then reaches 87 to 96 % of the peak
# (`python -m benchmarks.calibration`). Links are those of the data sheets, one way (1600 Gbit/s on
# v5e).
CHIP_SPECS: tuple[tuple[str, ChipSpec], ...] = (
    ("TPU v4", ChipSpec(2.1e9, 300e9)),
    ("TPU v5 lite", ChipSpec(1.5e9, 200e9)),
    ("TPU v5", ChipSpec(1.75e9, 600e9)),  # v5p
    ("TPU v6", ChipSpec(1.75e9, 400e9)),
)


class KernelCost(NamedTuple):
    """Cost of an attention kernel on a TPU, from the compiler's schedule."""

    rate: float  # share of the peak at which its FLOPs run
    query: float  # further cycles per query of a head


# By kernel name, for heads of 64 and tiles of 256, fitted to the output of
# `python -m benchmarks.kernels` for 16 and for 4 blocks. Heads of 64 leave half of a multiplier empty
# in the products over them.
KERNEL_COSTS = {"block_attention_forward": KernelCost(0.52, 2.2), "block_attention_backward": KernelCost(0.75, 4.5)}


class InstructionTime(NamedTuple):
    """Total time of one instruction in a call of the program."""

    name: str
    component: str  # component of the model or of the step
    kind: str  # one of KINDS
    phase: str  # one of PHASES
    seconds: float  # in all runs
    times: float  # runs in one call of the program
    source: str  # file:line in the package, and JAX's name of the operation


class Estimate(NamedTuple):
    """Estimated time of one call of a program on one device."""

    rows: list[InstructionTime]
    waiting: float  # seconds of collectives that block other instructions
    overlapping: float  # seconds of collectives that other instructions can hide
    useful: float  # seconds of the analytic FLOPs at the peak
    unknown: list[str]  # kernels of unknown cost, left out, and loops of unknown trip count, counted once
    crossing: float = 0.0  # bytes to other slices, whose time is not estimated

    @property
    def busy(self) -> float:
        """Seconds of computation."""
        return math.fsum(row.seconds for row in self.rows if row.kind != "collectives")

    @property
    def low(self) -> float:
        """Seconds if collectives overlap as far as possible."""
        return self.waiting + max(self.busy, self.overlapping)

    @property
    def high(self) -> float:
        """Seconds if no collective overlaps."""
        return self.waiting + self.busy + self.overlapping

    def table(self, column: str) -> dict[str, dict[str, float]]:
        """Returns seconds by component and by `column`, which is "kind" or "phase"."""
        cells: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in self.rows:
            cells[row.component][getattr(row, column)] += row.seconds
        return {component: dict(row) for component, row in sorted(cells.items(), key=lambda x: -sum(x[1].values()))}

    def figures(self) -> dict[str, Any]:
        """Returns the figures that a report of --mode=compile holds."""
        costliest = sorted(self.rows, key=lambda row: -row.seconds)[:COSTLIEST_COUNT]
        return {
            "busy": self.busy, "low": self.low, "high": self.high, "waiting": self.waiting,
            "overlapping": self.overlapping, "share_of_peak": self.useful / self.busy if self.busy else 0.0,
            "kinds": self.table("kind"), "phases": self.table("phase"),
            "costliest": [row._asdict() for row in costliest], "unknown": self.unknown, "crossing": self.crossing,
        }  # fmt: skip


def chip_spec(device_kind: str) -> ChipSpec | None:
    """Returns the spec of a kind of device, or None if it is unknown."""
    return next((spec for kind, spec in CHIP_SPECS if kind in device_kind), None)


def estimate(text: str, device_kind: str, peak: float, flops: float) -> Estimate:
    """Estimates the time of a program.

    Args:
      text: Text of the program, compiled at the optimization level of a run.
      device_kind: Kind of the device.
      peak: Peak FLOP/s of the device.
      flops: Analytic FLOPs of one device.

    Raises:
      ValueError: `CHIP_SPECS` does not have this kind of device.
    """
    chip = chip_spec(device_kind)
    if chip is None:
        raise ValueError(f"no clock is known for {device_kind}")
    program = hlo.parse(text)
    rows, unknown, crossing = [], hlo.unbounded_loops(program), 0.0
    moving = {True: 0.0, False: 0.0}  # seconds of collectives, by whether they can overlap
    for execution in hlo.executions(program):
        instruction, times = execution.instruction, execution.times
        name, op_name, cycles = instruction.name, instruction.op_name, instruction.cycles
        crossing += hlo.inter_slice_bytes(execution)
        component, op_phase = model_component(op_name), phase(op_name)
        source = program.source(instruction)
        if move := hlo.collective(program, execution):
            seconds = move.moved * (2 if instruction.opcode.startswith("all-reduce") else 1) / chip.link
            moving[move.overlaps or cycles is not None] += seconds
            rows.append(InstructionTime(name, component, "collectives", op_phase, seconds, times, source))
        if cycles is not None:
            kind, seconds = instruction_kind(program, instruction), times * cycles / chip.clock
            rows.append(InstructionTime(name, component, kind, op_phase, seconds, times, source))
        elif instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.rest:
            kernel = next((cost for kernel_name, cost in KERNEL_COSTS.items() if kernel_name in op_name), None)
            work = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)
            if kernel is None or work is None:
                unknown.append(name)
            else:
                *heads, _, queries = hlo.array_dimensions(instruction.shape)[0]
                query_seconds = math.prod(heads) * queries * kernel.query / chip.clock
                seconds = times * (int(work[1]) / (kernel.rate * peak) + query_seconds)
                rows.append(InstructionTime(name, "attention", "products", op_phase, seconds, times, source))
    return Estimate(rows, moving[False], moving[True], flops / peak, unknown, crossing)


def model_component(op_name: str) -> str:
    """Returns the component of the model or of the step that an operation belongs to."""
    if "downsampler" in op_name or "upsampler" in op_name:
        return "U-Net"
    if re.search(r"\battention\b", op_name):
        return "attention"
    scopes = ("ar_layers", "diffusion_layers", "optimizer", "codec", "text_head", "embedding")
    labels = {"ar_layers": "AR layers", "diffusion_layers": "diffusion layers", "codec": "VAE"}
    scope = next((name for name in scopes if name in op_name), "")
    return labels.get(scope, scope) or ("loss" if "jvp" in op_name else "rest")


def phase(op_name: str) -> str:
    """Returns which of PHASES an operation belongs to.

    "recomputed" is the forward pass again, for the backward pass. "update" is the optimizer.
    """
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
    """Returns which of KINDS an instruction is, except for collectives.

    A product fused with element-wise work is a product. A conversion is element-wise.
    """
    opcodes = {x.opcode for x in (instruction, *program.inner(instruction))}
    if opcodes & {"convolution", "dot"}:
        return "products"
    return "copies" if opcodes <= _COPY_OPCODES else "element-wise"


# ---- reports


def format_estimate(e: Estimate) -> str:
    """Formats an estimate as the lines of a report."""
    f = e.figures()
    lines = [
        f"  {'time, estimated':<24}{e.busy:9.3f} s of computation per device, {f['share_of_peak']:.0%} of the peak",
        f"  {'with collectives':<24}{e.low:9.3f} to {e.high:.3f} s: {e.waiting:.3f} s of them block, "
        f"{e.overlapping:.3f} s may overlap",
        f"  {'ms':<24}" + "".join(f"{name:>14}" for name in (*KINDS, *PHASES)),
    ]
    for name, cells in f["kinds"].items():
        columns = [cells.get(x, 0.0) for x in KINDS] + [f["phases"][name].get(x, 0.0) for x in PHASES]
        lines.append(f"  {name:<24}" + "".join(f"{1e3 * x:14.2f}" for x in columns))
    lines.append("  costliest instructions: ms, runs")
    lines += [
        f"  {1e3 * row['seconds']:9.2f} {row['times']:6.0f}  {row['component']}, {row['phase']}, {row['kind']}: {row['source']}"
        for row in f["costliest"]
    ]
    if e.unknown:
        lines.append(
            f"  kernels of unknown cost (left out) and loops of unknown length (counted once): {', '.join(e.unknown)}"
        )
    if e.crossing:
        lines.append(f"  to other slices         {e.crossing / 2**30:9.3f} GiB per device, whose time is not estimated")
    return "\n".join(lines)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Formats the differences of two reports of --mode=compile.

    These are the settings and, for each program, memory, seconds, and the cells of its tables with
    the largest change first. For a GPU, kernels, bytes and FLOPs take the place of seconds.

    Raises:
      KeyError: A report lacks a figure.
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
        figures = [f[name] if isinstance(f.get(name), dict) else {} for f in (before, after)]
        (old, new), work = ([f.get(key) for f in figures] for key in ("time", "work"))
        if all(work):
            lines += [f"{name:<36}{'before':>10}{'after':>10}", *_compare_work(*work)]
        if not old or not new:
            continue
        lines.append(f"{name:<36}{'before':>10}{'after':>10}")
        gib = (f"{f['bytes'] / 2**30:10.2f}" for f in figures)
        lines.append(f"  {'GiB per device':<34}{''.join(gib)}")
        lines.append(f"  {'share of the peak':<34}{old['share_of_peak']:10.1%}{new['share_of_peak']:10.1%}")
        lines += [f"  {f'{total}, s':<34}{old[total]:10.3f}{new[total]:10.3f}" for total in ("busy", "low", "high")]
        for table in ("kinds", "phases"):
            lines += [f"  {cell:<34}{x:10.3f}{y:10.3f}" for cell, x, y in _changed_cells(old[table], new[table])]
    return (
        "\n".join(lines)
        or "The settings are equal, and no program has an estimated time or a count of work in both files."
    )


def _compare_work(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns lines with the work of a program for a GPU in two reports (`cost.gpu_work`)."""
    lines = []
    for column, title, unit in (("kernels", "kernels", 1), ("bytes", "GB", 1e9), ("flops", "TFLOP", 1e12)):
        old_parts, new_parts = ({name: {title: x[column] / unit} for name, x in f["parts"].items()} for f in (old, new))
        cells = [(title, old[column] / unit, new[column] / unit), *_changed_cells(old_parts, new_parts)]
        lines += [f"  {cell:<34}{x:10.1f}{y:10.1f}" for cell, x, y in cells]
    return lines


def _changed_cells(old: _SecondsTable, new: _SecondsTable) -> list[tuple[str, float, float]]:
    """Returns the cells of two tables that differ, with the largest change first."""
    names = dict.fromkeys((row, column) for table in (old, new) for row, cells in table.items() for column in cells)
    changes = [
        (f"{row}, {column}", old.get(row, {}).get(column, 0.0), new.get(row, {}).get(column, 0.0))
        for row, column in names
    ]
    return sorted((x for x in changes if x[1] != x[2]), key=lambda x: -abs(x[2] - x[1]))


def _read_report(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            report = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}). Name two reports of --mode=compile.") from None
    if not isinstance(report, dict):
        raise ConfigError(f"{path} is not a report of --mode=compile.")
    return report


def main(argv: Sequence[str]) -> int:
    try:
        if len(argv) != 2:
            raise ConfigError(
                f"tpu_time compares two files, not {len(argv)}: python -m madformer_jax.cost.tpu_time BEFORE.json AFTER.json"
            )
        before, after = map(_read_report, argv)
        try:
            print(compare(before, after))
        except KeyError as error:
            raise ConfigError(
                f"{' or '.join(argv)} lacks {error}. Write both with --mode=compile of the same version."
            ) from None
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(f"{' or '.join(argv)} is not a report of --mode=compile.") from None
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
