"""The table type of a report, the format of its numbers, and its Markdown.

`tables` builds `Table`s, `html` and `report_sections.to_markdown` write them.
"""

import math
from typing import NamedTuple

from madformer_jax.reports.intervals import Estimate
from madformer_jax.reports.results import score_sign


class Annotated(NamedTuple):
    """An estimate with a remark in place of the values of the seeds."""

    estimate: Estimate
    note: str


Cell = str | Estimate | Annotated


class Table(NamedTuple):
    """A table of a report. The page prints the first line of a text cell in full size and the others small."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    # (row, column) of the cells in bold: the best mean of compared rows, or a clear difference.
    best: frozenset[tuple[int, int]] = frozenset()
    note: str = ""  # below the table
    command: str = ""  # shell command that reproduces one cell
    command_caption: str = ""  # description of that cell


def format_number(x: float) -> str:
    """Formats a number with three significant digits; only extreme values get an exponent."""
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e6:
        return str(int(x))
    if not 1e-5 <= abs(x) < 1e6:
        return f"{x:.2e}"
    return f"{x:.{min(7, max(0, 2 - math.floor(math.log10(abs(x)))))}f}"


def format_interval(x: Estimate) -> str:
    """Formats the interval of an estimate; empty for a single seed."""
    return "" if x.low is None or x.high is None else f"[{format_number(x.low)}, {format_number(x.high)}]"


def format_cell(x: Cell) -> str:
    """Formats a cell of Markdown in one line: mean, interval, and the value of every seed."""
    if isinstance(x, str):
        return x.replace("\n", "; ").replace("|", "\\|")
    if isinstance(x, Annotated):
        return "; ".join(filter(None, (format_mean(x.estimate), x.note)))
    points = f" ({', '.join(map(format_number, x.values))})" if len(x.values) > 1 else ""
    return format_mean(x) + points


def format_mean(x: Estimate) -> str:
    """Formats a mean, and its interval if it has one."""
    return f"{format_number(x.mean)} {format_interval(x)}".strip()


def score_heading(score: str) -> str:
    """Returns the name of a score with an arrow in the direction that is better."""
    return f"{score} {'↑' if score_sign(score) > 0 else '↓'}"


def table_to_markdown(table: Table) -> str:
    """Writes a table as Markdown, with the best means in bold."""
    lines = ["| " + " | ".join(table.header) + " |", "| " + " | ".join("---" for _ in table.header) + " |"]
    for i, row in enumerate(table.rows):
        cells = [f"**{format_cell(x)}**" if (i, j) in table.best else format_cell(x) for j, x in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    out = [f"### {table.title}", "", *lines, ""]
    if table.note:
        out += [table.note, ""]
    if table.command:
        out += [f"{table.command_caption}:", "", "```bash", table.command, "```", ""]
    return "\n".join(out)
