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
    """A table of a report.

    The page prints the first line of a text cell in full size and the others small.

    Attributes:
      title: The heading.
      header: Names of the columns.
      rows: The cells.
      best: (row, column) of the cells in bold: the best mean of compared rows, or a clear difference.
      note: A remark below the table.
      command: Shell command that reproduces one cell.
      command_caption: Description of that cell.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    command: str = ""
    command_caption: str = ""


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
        return "; ".join(
            filter(None, (f"{format_number(x.estimate.mean)} {format_interval(x.estimate)}".strip(), x.note))
        )
    points = f"({', '.join(map(format_number, x.values))})" if len(x.values) > 1 else ""
    return " ".join(filter(None, (format_number(x.mean), format_interval(x), points)))


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
