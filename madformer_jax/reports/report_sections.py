"""What a report holds, in order: the same for the page and for the Markdown file."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from madformer_jax.config import fields
from madformer_jax.reports import figures, sample_strips, tables
from madformer_jax.reports.figures import Panel
from madformer_jax.reports.formatting import Table, markdown
from madformer_jax.reports.results import COSTS, Budget, Part, Results, digest
from madformer_jax.reports.sample_strips import Strip

_OPEN = 2  # scores that are read without unfolding them
_FOUND = ("solver_steps", "passes")  # costs against which the first score's pairs are


class Figures(NamedTuple):
    """Panels side by side."""

    title: str
    panels: tuple[Panel, ...]


class Samples(NamedTuple):
    """Rows of samples at one budget."""

    budget: Budget
    strips: tuple[Strip, ...]


class Facts(NamedTuple):
    """Names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


class Folded(NamedTuple):
    """What is shown when it is asked for."""

    title: str
    tables: tuple[Table, ...]


Item = Table | Figures | Samples | Facts | Folded


class Section(NamedTuple):
    """A heading and what stands under it."""

    title: str
    items: tuple[Item, ...]
    folded: bool = False


def sections(results: Results) -> list[Section]:
    """All of a report.

    Raises:
      ConfigError: a grid of samples cannot be read.
    """
    first = [_first(results, part) for part in results.parts]  # of all parts, before more of any
    then = [_then(results, part) for part in results.parts]
    return [*itertools.chain(*first, *then), Section("Runs", (tables.of_runs(results), _versions(results)), True)]


def _title(part: Part, title: str) -> str:
    return f"{title}, {part.name}" if part.name else title


def _first(results: Results, part: Part) -> Iterable[Section]:
    if orders := tables.of_orders(part, part.scores[:_OPEN]):
        pairs = (tables.of_crossings(part, part.scores[0], cost) for cost in _FOUND)
        yield Section(_title(part, "Findings"), (orders, *(table for table in pairs if table)))
    yield Section(_title(part, "Tables"), tuple(tables.by_axis(results, part)))


def _then(results: Results, part: Part) -> Iterable[Section]:
    for i, score in enumerate(part.scores):
        costs = list(COSTS) if i < _OPEN else ["solver_steps"]
        folded = i >= (_OPEN if len(results.parts) == 1 else 1)
        yield Section(_title(part, score), tuple(_of_score(results, part, score, costs)), folded)
    if found := sample_strips.strips(results, part):
        yield Section(_title(part, "Samples"), tuple(Samples(budget, tuple(rows)) for budget, rows in found))
    yield Section(_title(part, "Costs"), (tables.of_costs(part), tables.of_training(results, part)), True)
    facts = tuple((name, str(value)) for name, value in fields.flat(part.protocol).items())
    yield Section(_title(part, "Protocol"), (Facts(f"Protocol {digest(part.protocol)}, of every score", facts),), True)


def _of_score(results: Results, part: Part, score: str, costs: Sequence[str]) -> list[Item]:
    varied = part.varied
    grid, many = part.is_grid, len(part.budgets) > 1
    against = [p for cost in costs for p in figures.curves(part, score, cost, varied[0] if varied and grid else None)]
    by: list[Panel] = []
    maps: list[Panel] = []
    for axis in varied if grid else ():
        if figures.is_ordered(axis) or not many:
            by += figures.by_value(part, score, axis)
        elif axis != varied[0]:
            against += figures.curves(part, score, "solver_steps", axis)
    if len(varied) == 2 and grid and all(map(figures.is_ordered, varied)):
        maps = [figures.heat(part, score, varied[0], varied[1], budget) for budget in part.budgets]
    items: list[Item] = [
        Figures(title, tuple(panels))
        for title, panels in (("Against the cost of an image", against), ("By value", by), ("Both at once", maps))
        if panels
    ]
    items += tables.by_budget(results, part, score)
    if best := tables.of_best(part, score):
        items.append(best)
    rest = [cost for cost in costs if score != part.scores[0] or cost not in _FOUND]
    if orders := tuple(table for cost in rest if (table := tables.of_crossings(part, score, cost))):
        items.append(Folded(f"Order of each pair by {score}", orders))
    return items


def _versions(results: Results) -> Facts:
    """Of the runs: several values of one where they were made by several."""
    found: dict[str, dict[str, None]] = {}
    for run in results.runs:
        for name, version in run.get("versions", {}).items():
            found.setdefault(name, {})[str(version)] = None
    return Facts("Versions", tuple((name, ", ".join(sorted(versions))) for name, versions in found.items()))


def as_markdown(results: Results, found: Iterable[Section]) -> str:
    """The tables, as Markdown."""
    lines = [f"# {heading(results)}", "", f"{results.question}\n" if results.question else "", f"{status(results)}\n"]
    for section in found:
        inside = [text for item in section.items if (text := _as_markdown(item))]
        lines += [f"## {section.title}", "", *inside] if inside else []
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _as_markdown(item: Item) -> str:
    if isinstance(item, Table):
        return markdown(item)
    if isinstance(item, Folded):
        return "\n".join([markdown(table) for table in item.tables])
    if isinstance(item, Facts):
        return "\n".join([f"### {item.title}", "", *(f"- {name}: {value}" for name, value in item.rows), ""])
    return ""


def heading(results: Results) -> str:
    return f"Sweep {results.name}" + (f", {results.variant}" if results.variant else "")


def status(results: Results) -> str:
    """How much of the sweep is there, and what is missing."""
    seeds = len({run["seed"] for run in results.runs})
    total = len(results.runs) + len(results.missing)
    text = f"{len(results.runs)} of {total} runs, {seeds} training seed{'s' if seeds > 1 else ''}."
    if results.missing:
        names = [
            "; ".join(f"{n} = {x}" for n, x in run["overrides"].items()) + f" ({run['name']})"
            for run in results.missing
        ]
        text += f" Missing: {', '.join(names)}."
    unmeasured = [p for part in results.parts for p in part.points if "seconds" not in p.cost]
    if unmeasured:
        text += (
            " Seconds an image are not measured for all settings: `--mode=sweep --measure` does, on a quiet machine."
        )
    return text
