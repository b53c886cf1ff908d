"""What a report holds, in order: the same for the page and for the Markdown file."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from madformer_jax.config import fields
from madformer_jax.reports import figures, sample_strips, tables
from madformer_jax.reports.figures import Panel
from madformer_jax.reports.formatting import Table, table_to_markdown
from madformer_jax.reports.results import COSTS, Budget, ProtocolGroup, Results, protocol_hash
from madformer_jax.reports.sample_strips import Strip

_EXPANDED_SCORES = 2  # scores that are read without unfolding them
_PAIR_COSTS = ("solver_steps", "passes")  # costs against which the first score's pairs are


class Figures(NamedTuple):
    """Panels side by side."""

    title: str
    panels: tuple[Panel, ...]


class Samples(NamedTuple):
    """Rows of samples at one budget."""

    budget: Budget
    strips: tuple[Strip, ...]


class FactTable(NamedTuple):
    """Names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


class CollapsedTables(NamedTuple):
    """What is shown when it is asked for."""

    title: str
    tables: tuple[Table, ...]


Item = Table | Figures | Samples | FactTable | CollapsedTables


class Section(NamedTuple):
    """A heading and what stands under it."""

    title: str
    items: tuple[Item, ...]
    folded: bool = False


def build_sections(results: Results) -> list[Section]:
    """All of a report.

    Raises:
      ConfigError: a grid of samples cannot be read.
    """
    first = [_main_sections(results, part) for part in results.parts]  # of all parts, before more of any
    then = [_detail_sections(results, part) for part in results.parts]
    return [
        *itertools.chain(*first, *then),
        Section("Runs", (tables.run_table(results), _version_facts(results)), True),
    ]


def _section_title(part: ProtocolGroup, title: str) -> str:
    return f"{title}, {part.name}" if part.name else title


def _main_sections(results: Results, part: ProtocolGroup) -> Iterable[Section]:
    if orders := tables.order_change_table(part, part.scores[:_EXPANDED_SCORES]):
        pairs = (tables.crossing_table(part, part.scores[0], cost) for cost in _PAIR_COSTS)
        yield Section(_section_title(part, "Findings"), (orders, *(table for table in pairs if table)))
    yield Section(_section_title(part, "Tables"), tuple(tables.axis_tables(results, part)))


def _detail_sections(results: Results, part: ProtocolGroup) -> Iterable[Section]:
    for i, score in enumerate(part.scores):
        costs = list(COSTS) if i < _EXPANDED_SCORES else ["solver_steps"]
        folded = i >= (_EXPANDED_SCORES if len(results.parts) == 1 else 1)
        yield Section(_section_title(part, score), tuple(_score_section(results, part, score, costs)), folded)
    if found := sample_strips.load_strips(results, part):
        yield Section(_section_title(part, "Samples"), tuple(Samples(budget, tuple(rows)) for budget, rows in found))
    yield Section(_section_title(part, "Costs"), (tables.cost_table(part), tables.training_table(results, part)), True)
    facts = tuple((name, str(value)) for name, value in fields.flat(part.protocol).items())
    yield Section(
        _section_title(part, "Protocol"),
        (FactTable(f"Protocol {protocol_hash(part.protocol)}, of every score", facts),),
        True,
    )


def _score_section(results: Results, part: ProtocolGroup, score: str, costs: Sequence[str]) -> list[Item]:
    varied = part.varied
    grid, many = part.is_grid, len(part.budgets) > 1
    against = [
        p for cost in costs for p in figures.cost_curves(part, score, cost, varied[0] if varied and grid else None)
    ]
    by: list[Panel] = []
    maps: list[Panel] = []
    for axis in varied if grid else ():
        if figures.is_ordered(axis) or not many:
            by += figures.axis_plots(part, score, axis)
        elif axis != varied[0]:
            against += figures.cost_curves(part, score, "solver_steps", axis)
    if len(varied) == 2 and grid and all(map(figures.is_ordered, varied)):
        maps = [figures.heat_map(part, score, varied[0], varied[1], budget) for budget in part.budgets]
    items: list[Item] = [
        Figures(title, tuple(panels))
        for title, panels in (("Against the cost of an image", against), ("By value", by), ("Both at once", maps))
        if panels
    ]
    items += tables.budget_tables(results, part, score)
    if best := tables.best_settings(part, score):
        items.append(best)
    rest = [cost for cost in costs if score != part.scores[0] or cost not in _PAIR_COSTS]
    if orders := tuple(table for cost in rest if (table := tables.crossing_table(part, score, cost))):
        items.append(CollapsedTables(f"Order of each pair by {score}", orders))
    return items


def _version_facts(results: Results) -> FactTable:
    """Of the runs: several values of one where they were made by several."""
    found: dict[str, dict[str, None]] = {}
    for run in results.runs:
        for name, version in run.get("versions", {}).items():
            found.setdefault(name, {})[str(version)] = None
    return FactTable("Versions", tuple((name, ", ".join(sorted(versions))) for name, versions in found.items()))


def to_markdown(results: Results, found: Iterable[Section]) -> str:
    """The tables, as Markdown."""
    lines = [f"# {heading(results)}", "", f"{results.question}\n" if results.question else "", f"{status(results)}\n"]
    for section in found:
        inside = [text for item in section.items if (text := _item_to_markdown(item))]
        lines += [f"## {section.title}", "", *inside] if inside else []
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _item_to_markdown(item: Item) -> str:
    if isinstance(item, Table):
        return table_to_markdown(item)
    if isinstance(item, CollapsedTables):
        return "\n".join([table_to_markdown(table) for table in item.tables])
    if isinstance(item, FactTable):
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
