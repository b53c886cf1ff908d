"""The sections of a report, in order, shared by the page and the Markdown file.

`modes.report` calls `build_sections`; `html.render` and `to_markdown` write the sections. To add a
table or figure, add it to `_answer_section` (first on the page), `_main_sections` or
`_detail_sections`. `Section.folded` decides what is visible at first.
"""

import itertools
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from madformer_jax.config import fields
from madformer_jax.reports import answers as answers_lib
from madformer_jax.reports import block_scores, comparisons, difference_figures, figures, sample_strips, tables
from madformer_jax.reports.figures import Panel
from madformer_jax.reports.formatting import Table, table_to_markdown
from madformer_jax.reports.results import COSTS, Budget, ProtocolGroup, Results, protocol_hash
from madformer_jax.reports.sample_strips import Strip
from madformer_jax.sweeps import protocol

_EXPANDED_SCORES = 2  # number of scores with figures against every cost
_READ_DOTS = "Dots are training seeds, lines their means, bars the 95 % t-interval of one mean."
_SIMULTANEOUS = "if no setting differs, at most 5 % of such figures have a bar that excludes 0."
_READ_DIFFERENCES = f"In figures of differences the bars are simultaneous: {_SIMULTANEOUS}"
_READ_ROWS = f"Dots are mean differences over paired seeds. Bars are simultaneous: {_SIMULTANEOUS}"
_READ_ANSWERS = (
    "An improvement above 0 supports the claim. The intervals of all claims hold together (95 %, Bonferroni). Those of a "
    "figure or table below hold together within it, so they can differ from these."
)


class Text(NamedTuple):
    """Paragraphs."""

    paragraphs: tuple[str, ...]


class Figures(NamedTuple):
    """Panels side by side, and a sentence on how to read them."""

    title: str
    panels: tuple[Panel, ...]
    caption: str = ""


class Samples(NamedTuple):
    """Rows of samples at one budget."""

    budget: Budget
    strips: tuple[Strip, ...]


class FactTable(NamedTuple):
    """Names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


Item = Text | Table | Figures | Samples | FactTable


class Section(NamedTuple):
    """A heading and the items below it. The page shows a folded section only after a click."""

    title: str
    items: tuple[Item, ...]
    folded: bool = False


def build_sections(results: Results) -> list[Section]:
    """Returns the sections of a report.

    Raises:
      ConfigError: A grid of samples cannot be read.
    """
    answer = _answer_section(results)
    shown = {panel.name for item in answer.items if isinstance(item, Figures) for panel in item.panels}
    main = [_main_sections(results, group) for group in results.groups]
    details = [_detail_sections(results, group) for group in results.groups]
    return [
        answer,
        *(_without_panels(section, shown) for section in itertools.chain(*main, *details)),
        Section("Runs", (tables.run_table(results), _version_facts(results)), True),
    ]


def _without_panels(section: Section, names: Collection[str]) -> Section:
    """Returns a section without the panels of these names, which the page has already shown."""
    items: list[Item] = []
    for item in section.items:
        if isinstance(item, Figures):
            item = item._replace(panels=tuple(panel for panel in item.panels if panel.name not in names))
        if not isinstance(item, Figures) or item.panels:
            items.append(item)
    return section._replace(items=tuple(items))


def _group_section(group: ProtocolGroup, title: str, items: Iterable[Item], folded: bool = False) -> Section:
    return Section(f"{title}, {group.name}" if group.name else title, tuple(items), folded)


def _answer_section(results: Results) -> Section:
    """Returns the answer to the sweep's question, with the figures that show it, and the protocol."""
    answers = answers_lib.answers(results)
    panels = [panel for group in results.groups for panel in _answer_panels(results, group)]
    items: list[Item] = [Text((*(answer.sentence for answer in answers), _READ_ANSWERS))] if answers else []
    if results.protocol and results.protocol["written"] == protocol.AFTER:
        items.append(Text(("The protocol was written after the results, so these answers are exploratory.",)))
    if panels:
        is_loss = results.protocol is not None and protocol.is_loss(results.protocol["primary"])
        has_differences = any("-difference-" in panel.name for panel in panels)
        caption = f"{_READ_DOTS} {_READ_DIFFERENCES}" if has_differences else _READ_DOTS
        items.append(Figures("", tuple(panels), _READ_ROWS if is_loss else caption))
    if results.protocol:
        seeds = len({run["seed"] for run in results.runs})
        facts = protocol.facts(results.protocol, results.question, seeds)
        items.append(FactTable("Protocol of the sweep", tuple(facts)))
    return Section("Answer", tuple(items))


def _answer_panels(results: Results, group: ProtocolGroup) -> Iterable[Panel]:
    """Yields the figures of the primary endpoint."""
    endpoint = results.protocol["primary"] if results.protocol else ""
    if protocol.is_loss(endpoint):
        differences = comparisons.loss_differences(results, group, endpoint)
        labels, baseline = comparisons.difference_labels(group, [(d.setting, d.baseline) for d in differences])
        rows = [(label, d.estimate) for label, d in zip(labels, differences)]
        if rows:
            difference = f"difference to {baseline}" if baseline else "differences"
            title = f"{answers_lib.endpoint_label(endpoint)} ↓, {difference}\n{group.data}"
            yield difference_figures.difference_rows(figures.file_name(group, endpoint, "differences"), title, rows)
        return
    scores = answers_lib.endpoint_scores(group, results.protocol)[:1]
    for score, budgets in itertools.product(scores, group.budgets_by_kind[-1:]):
        cost = "solver_steps" if budgets[0].kind == "steps" else budgets[0].kind
        axis = group.varying_axes[0] if group.varying_axes and group.is_grid else None
        if len(budgets) > 1:
            yield from figures.cost_curves(group, score, cost, axis)
            if band := difference_figures.difference_bands(group, score, budgets):
                yield band
        elif axis is not None:
            yield from figures.axis_plots(group, score, axis)


def _main_sections(results: Results, group: ProtocolGroup) -> Iterable[Section]:
    endpoints = answers_lib.endpoint_scores(group, results.protocol)
    compared = [table for score in endpoints for table in tables.difference_tables(group, score)]
    compared += tables.loss_tables(results, group)
    if compared:
        yield _group_section(group, "Differences", compared)
    if crossed := [table for score in endpoints for table in tables.crossing_tables(group, score)]:
        yield _group_section(group, "Order by budget", crossed, True)
    yield _group_section(group, "Scores", tables.axis_tables(results, group))
    if panels := block_scores.panels(results, group):
        yield _group_section(group, "Block by block", [Figures("", tuple(panels), block_scores.CAPTION)])


def _detail_sections(results: Results, group: ProtocolGroup) -> Iterable[Section]:
    for i, score in enumerate(group.scores):
        costs = list(COSTS) if i < _EXPANDED_SCORES else ["solver_steps"]
        yield _group_section(group, score, _score_items(results, group, score, costs), True)
    if table := block_scores.table(results, group):
        yield _group_section(group, "Scores by block", [table], True)
    if strips := sample_strips.load_strips(results, group):
        yield _group_section(group, "Samples", (Samples(budget, tuple(rows)) for budget, rows in strips))
    costs_of_group = [tables.cost_table(group), tables.training_table(results, group)]
    yield _group_section(group, "Costs", costs_of_group, True)
    facts = tuple((name, str(value)) for name, value in fields.flat(group.protocol).items())
    title = f"Protocol {protocol_hash(group.protocol)}, shared by all scores"
    yield _group_section(group, "Protocol", [FactTable(title, facts)], True)


def _score_items(results: Results, group: ProtocolGroup, score: str, costs: Sequence[str]) -> list[Item]:
    varied = group.varying_axes
    grid, several_budgets = group.is_grid, len(group.budgets) > 1
    first = varied[0] if varied and grid else None
    against = [panel for cost in costs for panel in figures.cost_curves(group, score, cost, first)]
    by: list[Panel] = []
    maps: list[Panel] = []
    for axis in varied if grid else ():
        if figures.is_ordered(axis) or not several_budgets:
            by += figures.axis_plots(group, score, axis)
        elif axis != varied[0]:
            against += figures.cost_curves(group, score, "solver_steps", axis)
    equal_scale = comparisons.has_equal_scale(group, group.settings, score)
    if len(varied) == 2 and grid and equal_scale and all(map(figures.is_ordered, varied)):
        scored = {point.budget for point in group.points if score in point.scores}
        maps = [figures.heat_map(group, score, varied[0], varied[1], x) for x in group.budgets if x in scored]
    titles = {"Score against the cost of an image": against, "Score by setting": by, "Score by two settings": maps}
    items: list[Item] = [Figures(title, tuple(panels), _READ_DOTS) for title, panels in titles.items() if panels]
    items += tables.budget_tables(results, group, score)
    if score not in answers_lib.endpoint_scores(group, results.protocol):
        items += tables.difference_tables(group, score)
    return items


def _version_facts(results: Results) -> FactTable:
    """Lists the versions of the packages that made the runs."""
    values: dict[str, dict[str, None]] = {}
    for run in results.runs:
        for name, version in run.get("versions", {}).items():
            values.setdefault(name, {})[str(version)] = None
    return FactTable("Versions", tuple((name, ", ".join(sorted(versions))) for name, versions in values.items()))


def to_markdown(results: Results, sections: Iterable[Section]) -> str:
    """Writes the tables as Markdown, with prose of at most 100 columns."""
    lines = [f"# {heading(results)}", "", f"{results.question}\n" if results.question else "", f"{status(results)}\n"]
    for section in sections:
        inside = [text for item in section.items if (text := _item_to_markdown(item))]
        lines += [f"## {section.title}", "", *inside] if inside else []
    return _wrap("\n".join(lines).replace("\n\n\n", "\n\n"))


def _wrap(text: str) -> str:
    """Wraps the prose of Markdown. Tables, headings and code blocks stay as they are."""
    lines, in_code = [], False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if not in_code and not line.startswith(("|", "#", "```")):
            indent = "  " if line.startswith("- ") else ""
            line = textwrap.fill(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines.append(line)
    return "\n".join(lines)


def _item_to_markdown(item: Item) -> str:
    if isinstance(item, Text):
        return "".join(f"- {paragraph}\n" for paragraph in item.paragraphs)
    if isinstance(item, Table):
        return table_to_markdown(item)
    if isinstance(item, FactTable):
        return "\n".join([f"### {item.title}", "", *(f"- {name}: {value}" for name, value in item.rows), ""])
    return ""


def heading(results: Results) -> str:
    data = "; ".join(dict.fromkeys(group.data for group in results.groups))
    return f"Sweep {results.name}" + (f", {results.variant}" if results.variant else "") + f" ({data})"


def status(results: Results) -> str:
    """Returns a sentence on finished and missing runs, and on costs that were not measured."""
    seeds = len({run["seed"] for run in results.runs})
    total = len(results.runs) + len(results.missing)
    text = f"{len(results.runs)} of {total} runs, {seeds} training seed{'s' if seeds > 1 else ''}."
    if results.missing:
        names = [
            "; ".join(f"{n} = {x}" for n, x in run["overrides"].items()) + f" ({run['name']})"
            for run in results.missing
        ]
        text += f" Missing: {', '.join(names)}."
    measured = {"seconds" in point.cost for group in results.groups for point in group.points}
    if False in measured:
        where = " for some settings" if True in measured else ""
        text += (
            f" Seconds per image were not measured{where}. `--mode=sweep --measure` on an idle machine measures them."
        )
    return text
