"""Parser of compiled programs (HLO text).

`parse` reads instructions, each with its operation name and source line. `executions` says how often
each instruction runs. `cost.tpu_time`, `cost.gpu_work` and `--mode=compile` call them. Add another
property of an instruction to `Instruction`.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    opcode: str
    shape: str  # shape of the result, as text
    operands: str
    rest: str  # attributes after the operands
    op_name: str  # JAX's path to the operation, "" if the compiler added it
    frame: int  # stack frame that traced it, 0 if unknown

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of the cycles of one run, or None."""
        match = _CYCLES.search(self.rest)
        return int(match[1]) if match else None


class Execution(NamedTuple):
    """An instruction that runs by itself. It is not part of a fusion but may be in a loop."""

    instruction: Instruction
    times: float  # runs in one call of the program
    loop: bool  # whether it is in a loop


class Program(NamedTuple):
    """A parsed program."""

    entry: str  # name of the entry computation
    computations: dict[str, list[Instruction]]
    source_lines: dict[int, str]  # stack frame -> file:line of its innermost frame in the package
    async_channels: frozenset[str]  # channels of collectives that one fusion begins and another ends

    def inner(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields the instructions of a fusion, an asynchronous start or a call, recursively."""
        for name in _CALLED_COMPUTATION.findall(instruction.rest):
            for called in self.computations.get(name, ()):
                yield called
                yield from self.inner(called)

    def source(self, instruction: Instruction) -> str:
        """Returns file:line in the package, and JAX's name of the operation."""
        operation = "/".join(instruction.op_name.split("/")[-2:])
        return f"{self.source_lines.get(instruction.frame, '?')} {operation}".strip()


class Collective(NamedTuple):
    """One instruction of a compiled program that moves data between devices."""

    kind: str  # one of COLLECTIVES
    shape: tuple[int, ...]  # shape of its largest operand or result, on one device
    bytes: int  # size of that array, or of all arrays that it moves together
    times: float  # runs in one call of the program
    loop: bool  # whether it is in a loop
    overlaps: bool = False  # whether others can run between its start and its end

    @property
    def moved(self) -> float:
        """Bytes in one call of the program."""
        return self.bytes * self.times


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED_COMPUTATION = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_LOOP_COMPUTATIONS = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SCALAR_INTEGER = re.compile(r"^[su]32\[\]")
_ARRAY = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c64)\[([\d,]*)\]")
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'
_TABLE_TITLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$")


def parse(text: str, package: str = "madformer_jax/") -> Program:
    """Parses the text of a compiled program.

    Args:
      text: Result of `as_text()`.
      package: Part of the path by which the package's own source files are recognized.
    """
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, current, table = "", "", ""
    for line in text.splitlines():
        if title := _TABLE_TITLE.match(line):
            table = title[1]
            tables[table] = {}
        elif header := _HEADER.match(line):
            current, table = header[2], ""
            computations[current] = []
            entry = current if header[1] else entry
        elif table and (row := re.match(r"(\d+) (.*)", line)):
            tables[table][int(row[1])] = row[2]
        elif current and (match := _INSTRUCTION.match(line)):
            name, shape, opcode, arguments = match.groups()
            operands, _, rest = arguments.partition(")")
            op_name, frame = _OP_NAME.search(rest), _FRAME.search(rest)
            origin = op_name[1] if op_name else "", int(frame[1]) if frame else 0
            computations[current].append(Instruction(name, opcode, shape, operands, rest, *origin))
    async_channels = {
        _channel_id(x)
        for lines in computations.values()
        if any(_ASYNC_START in line.rest for line in lines)
        for x in lines
        if _collective_kind(x.opcode)
    }
    return Program(entry, computations, _source_lines(tables, package), frozenset(async_channels))


def _channel_id(instruction: Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", instruction.rest)
    return match[1] if match else ""


def _source_lines(tables: dict[str, dict[int, str]], package: str) -> dict[int, str]:
    """Returns `Program.source_lines` from the tables of a program."""
    files, locations, frames = (tables.get(name, {}) for name in ("FileNames", "FileLocations", "StackFrames"))

    def number(row: str, field: str) -> int:
        match = re.search(rf"{field}=(\d+)", row)
        return int(match[1]) if match else 0

    source_lines: dict[int, str] = {}
    for frame in frames:
        current, visited = frame, set[int]()
        while current in frames and current not in visited:
            visited.add(current)
            location = locations.get(number(frames[current], "file_location_id"), "")
            file = files.get(number(location, "file_name_id"), "").strip('"')
            if package in file:
                source_lines[frame] = f"{file.rpartition(package)[2]}:{number(location, 'line')}"
                break
            current = number(frames[current], "parent_frame_id")
    return source_lines


def executions(program: Program) -> Iterator[Execution]:
    """Yields every instruction that runs by itself, with how often it runs.

    A loop with an unknown trip count counts once. If a conditional has two branches, both count in
    full, because one of them is mostly empty. If it has n > 2 branches, each counts as 1 / n.
    """

    def visit(name: str, times: float, loop: bool) -> Iterator[Execution]:
        for line in program.computations.get(name, ()):
            if line.opcode == "while":
                for called in _LOOP_COMPUTATIONS.findall(line.rest):
                    yield from visit(called, times * (_trip_count(program, line) or 1), True)
            elif line.opcode in ("call", "conditional"):
                branches = _BRANCHES.search(line.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED_COMPUTATION.findall(line.rest)
                for called in names:
                    yield from visit(called, times / (len(names) if len(names) > 2 else 1), loop)
            else:
                yield Execution(line, times, loop)

    yield from visit(program.entry, 1, False)


def unbounded_loops(program: Program) -> list[str]:
    """Returns the names of loops whose trip count is unknown."""
    loops = (x for lines in program.computations.values() for x in lines if x.opcode == "while")
    return [loop.name for loop in loops if _trip_count(program, loop) is None]


def _trip_count(program: Program, loop: Instruction) -> int | None:
    known = _TRIP_COUNT.findall(loop.rest)
    if not known:  # on a TPU, the condition compares the counter with its only constant
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        instructions = program.computations.get(condition[1], []) if condition else []
        known = [x.operands for x in instructions if x.opcode == "constant" and _SCALAR_INTEGER.match(x.shape)]
    return int(known[0]) if len(known) == 1 else None


def inter_slice_bytes(execution: Execution) -> float:
    """Returns the bytes that an instruction sends to other slices over the data center's network.

    Megascale is libtpu's runtime for this network.
    """
    x = execution.instruction
    if x.opcode != "send" or "megascale" not in x.rest:
        return 0.0
    return execution.times * max(array_bytes(*a) for a in _ARRAY.findall(x.shape))


def collective(program: Program, execution: Execution) -> Collective | None:
    """Returns the data that an instruction moves between devices.

    Returns None if it moves none, or if it ends a collective that another instruction began. An
    all-reduce fused with a slice, as some backends compile a reduce-scatter, counts as an all-reduce.
    """
    instructions = [execution.instruction, *program.inner(execution.instruction)]
    move = next((x for x in instructions if _collective_kind(x.opcode)), None)
    if move is None:
        return None
    begins = any(_ASYNC_START in x.rest for x in instructions)
    if _channel_id(move) in program.async_channels and not begins:
        return None
    arrays = [
        [(array_bytes(*a), dimensions(a[1])) for a in _ARRAY.findall(text)] for text in (move.shape, move.operands)
    ]
    size, shape = max(arrays[0] + arrays[1])
    if not move.opcode.endswith("-start"):  # the result of a start lists operands as well
        size = max(sum(size for size, _ in side) for side in arrays)
    overlaps = begins or any(x.opcode.endswith("-start") for x in (execution.instruction, move))
    return Collective(_collective_kind(move.opcode), shape, size, execution.times, execution.loop, overlaps)


def library_calls(text: str) -> dict[str, int]:
    """Counts the instructions of a GPU program that call a library or Triton, by target name."""
    targets = re.findall(r'custom_call_target="(__[^"]+)"', text) + re.findall(r'"kind":"(__triton[^"]*)"', text)
    return dict(sorted(collections.Counter(targets).items()))


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, each with how often it runs."""
    program = parse(text)
    return [x for execution in executions(program) if (x := collective(program, execution))]


def _collective_kind(opcode: str) -> str:
    return next((kind for kind in COLLECTIVES if opcode in (kind, f"{kind}-start")), "")


def arrays(text: str) -> list[tuple[str, str]]:
    """Returns the type and the dimensions of each array in a shape, all as text."""
    return _ARRAY.findall(text)


def array_dimensions(text: str) -> list[tuple[int, ...]]:
    """Returns the dimensions of each array in a shape, given as text."""
    return [dimensions(dims) for _, dims in _ARRAY.findall(text)]


def dimensions(dims: str) -> tuple[int, ...]:
    return tuple(int(n) for n in dims.split(",") if n)


def array_bytes(kind: str, dims: str) -> int:
    bits = 8 if kind == "pred" else int("".join(re.findall(r"\d+", kind)[:1]))
    return math.prod(dimensions(dims)) * bits // 8
