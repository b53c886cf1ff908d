"""Kernels, bytes and FLOPs of a program that is compiled for a GPU, by part of the model.

`--mode=compile` prints the table for GPUs, in place of the seconds that `cost.tpu_time` estimates for
TPUs. XLA gives no time for a GPU, but two settings can still be compared. Kernels count the
launches, bytes count the traffic to memory, and FLOPs count the products. Recomputed products are
included.

Bytes are those of the operands and results of each kernel. A kernel that slices an operand, or that
updates a part of it in place, counts for that part only. Caches on the chip are ignored. A call of
cuDNN's attention counts the queries and keys within its sequence lengths if these are constants, and
all of its operands otherwise.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from madformer_jax.cost import hlo, tpu_time

COLUMNS = ("kernels", "bytes", "flops")
COSTLIEST_COUNT = 10

# Instructions that are not kernels.
_FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id",
    "replica-id", "reshape", "tuple",
}  # fmt: skip
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = '"__cudnn$fmha', "Backward"
_SLICES = {"slice", "dynamic-slice", "gather"}
_VIEWS = {"bitcast", "reshape", "convert", "copy", "transpose"}
_NAME = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)')
_CONVOLUTION = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_INTEGER_VECTOR = re.compile(r"s32\[\d+\]")
_SCORES = re.compile(r'"intermediate_tensor_shape": ?\{[^}]*?"dimensions": ?\[([^\]]*)\]')


class KernelWork(NamedTuple):
    """Work of one instruction in a call of the program, over all its runs."""

    name: str
    component: str  # see `component`
    phase: str  # one of `tpu_time.PHASES`
    kernels: float
    bytes: float
    flops: float
    source: str  # file:line in the package, and JAX's name of the operation


class Work(NamedTuple):
    """Work of one call of a program on one device."""

    rows: list[KernelWork]
    unbounded: list[str]  # loops of unknown trip count, counted once

    def parts(self) -> dict[str, dict[str, float]]:
        """Returns `COLUMNS`, and the bytes of each phase, by component. Most bytes come first."""
        cells: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in self.rows:
            for column in COLUMNS:
                cells[row.component][column] += getattr(row, column)
            cells[row.component][row.phase] += row.bytes
        return {name: dict(row) for name, row in sorted(cells.items(), key=lambda x: -x[1]["bytes"])}

    def calls(self, target: str) -> float:
        """Returns the runs of the instructions whose name or target contains `target`."""
        return sum(row.kernels for row in self.rows if target in row.name)

    def figures(self) -> dict[str, Any]:
        """Returns the figures that a report of --mode=compile holds."""
        costliest = sorted(self.rows, key=lambda row: -row.bytes)[:COSTLIEST_COUNT]
        return {
            **{column: math.fsum(getattr(row, column) for row in self.rows) for column in COLUMNS},
            "parts": self.parts(),
            "costliest": [row._asdict() for row in costliest],
            "unbounded": self.unbounded,
        }


def measure(text: str) -> Work:
    """Returns the work of a compiled program, given as text."""
    program = hlo.parse(text)
    shapes = {x.name: x.shape for lines in program.computations.values() for x in lines}
    lengths = _constant_lengths(program)
    rows = []
    for execution in hlo.executions(program):
        x, times = execution.instruction, execution.times
        if x.opcode in _FREE or x.opcode.endswith("-done") or _ALLOCATION in x.rest:
            continue
        flops = sum(_flops(y, shapes, lengths) for y in (x, *program.inner(x)))
        target = re.search(r'custom_call_target="([^"]+)"', x.rest)
        rows.append(
            KernelWork(
                name=f"{target[1]} {x.name}" if target else x.name,
                component=component(program, x, flops > 0),
                phase=tpu_time.phase(x.op_name),
                kernels=times,
                bytes=times * _bytes(program, x, shapes, lengths),
                flops=times * flops,
                source=program.source(x),
            )
        )
    return Work(rows, hlo.unbounded_loops(program))


def component(program: hlo.Program, x: hlo.Instruction, is_product: bool) -> str:
    """Returns the part of the model or of the step that a kernel belongs to."""
    component = tpu_time.model_component(x.op_name)
    if component == "attention":
        return "attention, kernels" if is_product else "attention, glue"
    if component in ("AR layers", "diffusion layers"):
        if is_product:
            return "layers, products"
        if "swiglu" in x.op_name:
            return "layers, SwiGLU"
        opcodes = {y.opcode for y in (x, *program.inner(x))} - _FREE - {"fusion"}
        stacks = {"dynamic-slice", "dynamic-update-slice"}
        return "layers, stacks" if opcodes & stacks and opcodes <= stacks | _VIEWS else "layers, norms and sums"
    if component == "U-Net":
        return "U-Net, products" if is_product else "U-Net, norms and copies"
    return component


# ---- bytes


def _bytes(program: hlo.Program, x: hlo.Instruction, shapes: Mapping[str, str], lengths: Mapping[str, int]) -> float:
    """Returns the bytes that one run of a kernel reads and writes."""
    if _ATTENTION_FORWARD in x.rest:
        return _attention_bytes(x, shapes, lengths)
    operands = [_size(shapes.get(name, "")) for name in _NAME.findall(x.operands)]
    called = re.search(r"calls=%?([\w.\-]+)", x.rest)
    if x.opcode == "fusion" and called and called[1] in program.computations:
        return _fusion_bytes(program.computations[called[1]], operands, shapes)
    if x.opcode in _SLICES:
        return 2 * _size(x.shape)
    if x.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    return sum(operands) + _size(x.shape)


def _fusion_bytes(lines: list[hlo.Instruction], operands: list[float], shapes: Mapping[str, str]) -> float:
    """Returns the bytes that a fusion reads and writes.

    The share of each value that is needed follows from the results, backward: a slice needs a part of
    its operand, and an update in place needs nothing of the array that it changes.
    """
    if not lines:
        return sum(operands)
    needed: dict[str, float] = defaultdict(float)  # name -> share that the results need, at most 1
    needed[lines[-1].name] = 1.0
    written = {lines[-1].name: _size(lines[-1].shape)}
    reads = 0.0
    for line in reversed(lines):  # users come after what they use
        share, names = min(1.0, needed[line.name]), _NAME.findall(line.operands)
        if line.opcode == "parameter":
            size = operands[int(line.operands)] if int(line.operands) < len(operands) else 0.0
            reads += share * size
            continue
        if line.name in written and line.opcode == "dynamic-update-slice":
            written[line.name] = _size(shapes.get(names[1], ""))
        elif line.name in written and line.opcode in ("tuple", "bitcast"):
            written |= {name: _size(shapes.get(name, "")) for name in names}
            del written[line.name]
        for n, name in enumerate(names):
            if line.opcode in _SLICES and n == 0:
                # Slices of one array mostly read different parts of it.
                needed[name] += share * _size(line.shape) / max(1.0, _size(shapes.get(name, "")))
            elif line.opcode == "dynamic-update-slice" and n == 0:
                needed[name] = max(needed[name], 0.0 if written.get(line.name) is not None else share)
            else:
                needed[name] = max(needed[name], share)
    return reads + sum(written.values())


def _size(shape: str) -> float:
    """Returns the bytes of a shape or a tuple of shapes, given as text."""
    return float(sum(hlo.array_bytes(*array) for array in hlo.arrays(shape)))


# ---- cuDNN's attention


def _constant_lengths(program: hlo.Program) -> dict[str, int]:
    """Returns the value of each vector of integers that repeats one constant, by name."""
    lengths = {}
    for lines in program.computations.values():
        constants = {x.name: x.operands for x in lines if x.opcode == "constant"}
        for x in lines:
            if x.opcode not in ("broadcast", "fusion") or not _INTEGER_VECTOR.match(x.shape):
                continue
            values = {constants[name] for name in _NAME.findall(x.operands) if name in constants}
            values |= {y.operands for y in program.inner(x) if y.opcode == "constant"}
            opcodes = {y.opcode for y in program.inner(x)} - {"constant", "broadcast", "parameter"}
            if len(values) == 1 and not opcodes and (value := values.pop()).isdecimal():
                lengths[x.name] = int(value)
    return lengths


def _attention_shares(x: hlo.Instruction, shapes: Mapping[str, str], lengths: Mapping[str, int]) -> tuple[float, float]:
    """Returns the shares of queries and of keys that are within the sequence lengths of a call."""
    names = _NAME.findall(x.operands)
    vectors = [name for name in names if _INTEGER_VECTOR.match(shapes.get(name, ""))]
    tokens = [hlo.array_dimensions(shapes[name])[0][1] for name in names[:2]]
    if len(vectors) != 2:
        return 1.0, 1.0
    q, k = (lengths.get(name, n) / n for name, n in zip(vectors, tokens, strict=True))
    return q, k


def _attention_bytes(x: hlo.Instruction, shapes: Mapping[str, str], lengths: Mapping[str, int]) -> float:
    """Returns the bytes of a call: its operands are q, k, v, then arrays of queries. Its results are dq, dk, dv or out."""
    queries, keys = _attention_shares(x, shapes, lengths)
    operands = [_size(shapes.get(name, "")) for name in _NAME.findall(x.operands)]
    results = [float(hlo.array_bytes(*array)) for array in hlo.arrays(x.shape)]
    read = queries * (operands[0] + sum(operands[3:])) + keys * sum(operands[1:3])
    if _ATTENTION_BACKWARD not in x.rest:
        return read + queries * sum(results)
    return read + queries * results[0] + keys * sum(results[1:])


# ---- FLOPs


def _flops(x: hlo.Instruction, shapes: Mapping[str, str], lengths: Mapping[str, int]) -> float:
    """Returns the FLOPs of one product, convolution or call of attention; 0 for other instructions."""
    operands = [hlo.array_dimensions(shapes.get(name, "")) for name in _NAME.findall(x.operands)]
    result = hlo.array_dimensions(x.shape)
    if x.opcode == "convolution" or "__cudnn$conv" in x.rest:
        return _convolution_flops(x, operands, result)
    if _ATTENTION_FORWARD in x.rest:
        scores = _SCORES.search(x.rest)
        pairs: float = math.prod(int(n) for n in re.findall(r"\d+", scores[1])) if scores else 0
        pairs *= math.prod(_attention_shares(x, shapes, lengths))
        # Two products forward. Five backward, as the scores are computed again.
        return (10.0 if _ATTENTION_BACKWARD in x.rest else 4.0) * pairs * operands[0][0][-1]
    if (x.opcode == "dot" or "__cublas$" in x.rest) and (dims := _CONTRACTED.search(x.rest)) and operands[0]:
        contracted = math.prod(operands[0][0][int(n)] for n in re.findall(r"\d+", dims[1]))
        return 2.0 * math.prod(result[0]) * contracted
    return 0.0


def _convolution_flops(x: hlo.Instruction, operands: list[list[Any]], result: list[Any]) -> float:
    """Returns the FLOPs of a convolution or of one of its gradients, zero padding included."""
    labels = _CONVOLUTION.search(x.rest)
    if labels is None or len(operands) < 2 or not (operands[0] and operands[1] and result):
        return 0.0
    arrays = {"kernel": operands[1][0], "output": result[0]}
    if "convBackwardInput" in x.rest:
        arrays["output"] = operands[0][0]
    elif "convBackwardFilter" in x.rest:
        arrays = {"kernel": result[0], "output": operands[1][0]}
    return 2.0 * math.prod(arrays["output"]) * math.prod(arrays["kernel"]) / arrays["kernel"][labels[2].index("o")]


# ---- reports


def format_work(work: Work) -> str:
    """Formats the work of a program as the lines of a report."""
    f = work.figures()
    titles = ("GB " + ("again" if x == "recomputed" else x) for x in tpu_time.PHASES)
    lines = [f"  {'work per device':<24}{'kernels':>10}{'GB':>10}{'TFLOP':>10}" + "".join(f"{x:>12}" for x in titles)]
    for name, row in {**f["parts"], "total": {column: f[column] for column in COLUMNS}}.items():
        phases = "".join(f"{row.get(x, 0.0) / 1e9:12.1f}" for x in tpu_time.PHASES if name != "total")
        lines.append(f"  {name:<24}{row['kernels']:10.0f}{row['bytes'] / 1e9:10.1f}{row['flops'] / 1e12:10.2f}{phases}")
    lines.append("  kernels that move most: GB, runs")
    lines += [
        f"  {row['bytes'] / 1e9:9.2f} {row['kernels']:6.0f}  {row['component']}, {row['phase']}: {row['source']}"
        for row in f["costliest"]
    ]
    if work.unbounded:
        lines.append(f"  loops of unknown length (counted once): {', '.join(work.unbounded)}")
    return "\n".join(lines)
