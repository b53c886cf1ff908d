"""The text of a compiled program (HLO) as instructions, each with how often it runs and where in our source it comes from."""

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
    shape: str  # of the result, as the text has it
    operands: str
    rest: str  # attributes behind the operands
    op_name: str  # JAX's path to it, "" where the compiler made it
    frame: int  # of the stack that traced it, 0 for none

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run; None where it has none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None


class Execution(NamedTuple):
    """An instruction that runs by itself: no part of a fusion, but perhaps of a loop's body."""

    instruction: Instruction
    times: float  # in one call of the program
    loop: bool  # inside a loop


class Program(NamedTuple):
    """A parsed text."""

    entry: str
    computations: dict[str, list[Instruction]]
    places: dict[int, str]  # frame -> file:line of the innermost frame in our own source
    begun: frozenset[str]  # channels of collectives that a fusion begins and others go on with and end

    def inner(self, instruction: Instruction) -> Iterator[Instruction]:
        """What a fusion, an asynchronous start or a call consists of, fusions within it as well."""
        for name in _CALLED_COMPUTATION.findall(instruction.rest):
            for inside in self.computations.get(name, ()):
                yield inside
                yield from self.inner(inside)


class Collective(NamedTuple):
    """One instruction of a compiled program that moves data between devices."""

    kind: str  # of COLLECTIVES
    shape: tuple[int, ...]  # of its largest operand or result, on one device
    bytes: int  # of that array, or of all that it moves together
    times: float  # that it runs in one call of the program
    loop: bool  # inside a loop
    overlaps: bool = False  # begun and ended by two instructions, between which others run

    @property
    def moved(self) -> float:
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


def parse(text: str, ours: str = "madformer_jax/") -> Program:
    """Reads a program's text; `ours` is what the path of a file of our own contains."""
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
        elif current and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, behind = found.groups()
            operands, _, rest = behind.partition(")")
            op_name, frame = _OP_NAME.search(rest), _FRAME.search(rest)
            computations[current].append(
                Instruction(
                    name=name,
                    opcode=opcode,
                    shape=shape,
                    operands=operands,
                    rest=rest,
                    op_name=op_name[1] if op_name else "",
                    frame=int(frame[1]) if frame else 0,
                )
            )
    begun = {
        _channel_id(x)
        for lines in computations.values()
        if any(_ASYNC_START in line.rest for line in lines)
        for x in lines
        if _collective_kind(x.opcode)
    }
    return Program(entry, computations, _source_locations(tables, ours), frozenset(begun))


def _channel_id(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return found[1] if found else ""


def _source_locations(tables: dict[str, dict[int, str]], ours: str) -> dict[int, str]:
    """See `Program.places`."""
    files, locations, frames = (tables.get(name, {}) for name in ("FileNames", "FileLocations", "StackFrames"))

    def number(row: str, field: str) -> int:
        found = re.search(rf"{field}=(\d+)", row)
        return int(found[1]) if found else 0

    places: dict[int, str] = {}
    for frame in frames:
        at, seen = frame, set[int]()
        while at in frames and at not in seen:
            seen.add(at)
            location = locations.get(number(frames[at], "file_location_id"), "")
            file = files.get(number(location, "file_name_id"), "").strip('"')
            if ours in file:
                places[frame] = f"{file.rpartition(ours)[2]}:{number(location, 'line')}"
                break
            at = number(frames[at], "parent_frame_id")
    return places


def executions(program: Program) -> Iterator[Execution]:
    """Every instruction that runs by itself, with how often it does.

    A loop whose trip count is unknown counts once. Of a choice between two branches both count, one of which is mostly empty;
    of a choice between more, each counts as its share.
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
    """The loops whose trip count is unknown."""
    loops = (x for lines in program.computations.values() for x in lines if x.opcode == "while")
    return [loop.name for loop in loops if _trip_count(program, loop) is None]


def _trip_count(program: Program, loop: Instruction) -> int | None:
    known = _TRIP_COUNT.findall(loop.rest)
    if not known:  # TPU: only the condition tells, which holds the counter against the one constant in it
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        inside = program.computations.get(condition[1], []) if condition else []
        known = [x.operands for x in inside if x.opcode == "constant" and _SCALAR_INTEGER.match(x.shape)]
    return int(known[0]) if len(known) == 1 else None


def inter_slice_bytes(run: Execution) -> float:
    """Bytes that an instruction sends to other slices, over the data centre's network (libtpu's runtime for it is Megascale)."""
    x = run.instruction
    if x.opcode != "send" or "megascale" not in x.rest:
        return 0.0
    return run.times * max(array_bytes(*a) for a in _ARRAY.findall(x.shape))


def collective(program: Program, run: Execution) -> Collective | None:
    """The data that an instruction moves between devices; None for one that moves none, and for the end of one begun before.

    A reduce-scatter that a backend has as a fused all-reduce with a slice counts as an all-reduce.
    """
    inside = [run.instruction, *program.inner(run.instruction)]
    move = next((x for x in inside if _collective_kind(x.opcode)), None)
    if move is None:
        return None
    begins = any(_ASYNC_START in x.rest for x in inside)
    if _channel_id(move) in program.begun and not begins:
        return None
    found = [
        [(array_bytes(*a), dimensions(a[1])) for a in _ARRAY.findall(text)] for text in (move.shape, move.operands)
    ]
    size, shape = max(found[0] + found[1])
    if not move.opcode.endswith("-start"):  # whose result lists operands as well; here several arrays may move together
        size = max(sum(size for size, _ in arrays) for arrays in found)
    overlaps = begins or any(x.opcode.endswith("-start") for x in (run.instruction, move))
    return Collective(_collective_kind(move.opcode), shape, size, run.times, run.loop, overlaps)


def library_calls(text: str) -> dict[str, int]:
    """How many instructions of a GPU's program call each library, or are Triton's; by the targets' own names."""
    found = re.findall(r'custom_call_target="(__[^"]+)"', text) + re.findall(r'"kind":"(__triton[^"]*)"', text)
    return dict(sorted(collections.Counter(found).items()))


def collectives(text: str) -> list[Collective]:
    """The collectives of a text, each with how often it runs."""
    program = parse(text)
    return [x for run in executions(program) if (x := collective(program, run))]


def _collective_kind(opcode: str) -> str:
    return next((kind for kind in COLLECTIVES if opcode in (kind, f"{kind}-start")), "")


def array_dimensions(text: str) -> list[tuple[int, ...]]:
    """The dimensions of each array in a shape."""
    return [dimensions(dims) for _, dims in _ARRAY.findall(text)]


def dimensions(dims: str) -> tuple[int, ...]:
    return tuple(int(n) for n in dims.split(",") if n)


def array_bytes(kind: str, dims: str) -> int:
    bits = 8 if kind == "pred" else int("".join(re.findall(r"\d+", kind)[:1]))
    return math.prod(dimensions(dims)) * bits // 8
