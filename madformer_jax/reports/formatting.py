"""What a table of a report is, how its figures are written, and its Markdown."""

import math
from typing import NamedTuple

from madformer_jax.reports.results import Estimate, score_sign

Cell = str | Estimate


class Table(NamedTuple):
    """Rows of cells, and what belongs to them. A text's lines below its first are less important."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the best mean of each group that compares
    note: str = ""
    command: str = ""  # that makes one cell
    gives: str = ""  # which


def format_number(x: float) -> str:
    """Four significant digits, without an exponent where there is room."""
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e6:
        return str(int(x))
    if not 1e-4 <= abs(x) < 1e6:
        return f"{x:.3e}"
    return f"{x:.{min(6, max(0, 3 - math.floor(math.log10(abs(x)))))}f}"


def format_interval(found: Estimate) -> str:
    return (
        "" if found.low is None or found.high is None else f"[{format_number(found.low)}, {format_number(found.high)}]"
    )


def format_cell(x: Cell) -> str:
    """A cell in one line: the mean, its interval, every seed's value."""
    if isinstance(x, str):
        return x.replace("\n", "; ")
    points = f"({', '.join(map(format_number, x.values))})" if len(x.values) > 1 else ""
    return " ".join(filter(None, (format_number(x.mean), format_interval(x), points)))


def score_heading(score: str) -> str:
    """A score's name, and the direction in which it is better."""
    return f"{score} {'↑' if score_sign(score) > 0 else '↓'}"


def table_to_markdown(table: Table) -> str:
    """The best means are bold."""
    lines = ["| " + " | ".join(table.head) + " |", "| " + " | ".join("---" for _ in table.head) + " |"]
    for i, row in enumerate(table.rows):
        cells = [f"**{format_cell(x)}**" if (i, j) in table.best else format_cell(x) for j, x in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    out = [f"### {table.title}", "", *lines, ""]
    if table.note:
        out += [table.note, ""]
    if table.command:
        out += [f"{table.gives}:", "", "```bash", table.command, "```", ""]
    return "\n".join(out)
