"""The tables of a report: scores, best settings, crossings and costs; and all points as CSV.

`report_sections` arranges the tables. Below each table of scores is a command that reproduces one of
its cells.
"""

import csv
import io
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from madformer_jax.reports.axes import Axis
from madformer_jax.reports.comparisons import Crossing, PairedDifference, find_crossings
from madformer_jax.reports.formatting import Cell, Table, format_interval, format_number, score_heading
from madformer_jax.reports.results import (
    COSTS,
    Budget,
    Estimate,
    Point,
    ProtocolGroup,
    Results,
    estimate,
    protocol_hash,
    score_sign,
)

Setting = tuple[Any, ...]
_COST_COLUMNS = {
    "solver_steps": "solver steps",
    "nfe": "NFE",
    "passes": "passes",
}  # costs in the last columns of a table of scores
_PAIRED_NOTE = (
    "Differences are means over the seeds that both settings have, with their t-intervals. "
    "Between its points a curve is linear in the logarithm of the cost. Clear: the interval does not include 0."
)


# ---- scores


def axis_tables(results: Results, group: ProtocolGroup) -> list[Table]:
    """Returns tables in the paper's form: all scores for each value of an axis.

    Each kind of budget contributes its largest budget. A grid has a table for each axis; a base and its
    ablations have one table.
    """
    axes = group.axes
    varied = [i for i, axis in enumerate(axes) if len(axis.values) > 1]
    tables = []
    for budget in (kind[-1] for kind in group.budgets_by_kind):
        if len(varied) < 2 or not group.is_grid:
            label = ", ".join(axes[i].label for i in varied) or "Scores"
            tables.append(
                _score_table(results, group, f"{label}, at {budget}", group.settings, range(len(axes)), budget)
            )
            continue
        for i in varied:
            order = [*(j for j in varied if j != i), i]
            settings = sorted(group.settings, key=lambda s: [axes[j].values.index(s[j]) for j in order])
            title = f"{axes[i].label}, at {budget}"
            tables.append(_score_table(results, group, title, settings, order, budget, len(order) - 1))
    return tables


def _score_table(
    results: Results,
    group: ProtocolGroup,
    title: str,
    settings: Sequence[Setting],
    order: Iterable[int],
    budget: Budget,
    shared_columns: int = 0,
) -> Table:
    """Builds a table with a row for each setting.

    Args:
      results: The results, for the command.
      group: The points.
      title: The heading.
      settings: The settings, in the order of the rows.
      order: The axes in the order of the columns.
      budget: The budget.
      shared_columns: Only rows that agree in this many first columns compete for the best mean.
    """
    shown = [group.axes[i] for i in order]
    names = [
        name for name in group.scores if any(name in p.scores for s in settings for p in group.points_at(s, budget))
    ]
    rows, values = [], []
    for setting in settings:
        at = group.points_at(setting, budget)
        values.append([_estimate_score(at, name) for name in names])
        labels = [str(setting[group.axes.index(axis)]) for axis in shown]
        costs = [format_number(at[0].cost[name]) if at and name in at[0].cost else "" for name in _COST_COLUMNS]
        rows.append((*labels, *(x or "" for x in values[-1]), *costs))
    groups = [row[:shared_columns] for row in rows]
    best = {
        (i, len(shown) + j)
        for j, name in enumerate(names)
        for g in dict.fromkeys(groups)
        for i in _best_row([row[j] if groups[k] == g else None for k, row in enumerate(values)], score_sign(name))
    }
    head = (*(axis.label for axis in shown), *map(score_heading, names), *_COST_COLUMNS.values())
    fields = "; ".join(f"{axis.label} is `{axis.field}`" + _dependent_axes_note(axis) for axis in shown)
    first = next(p for s in settings for p in group.points_at(s, budget))
    return Table(
        title,
        head,
        tuple(rows),
        frozenset(best),
        f"{fields}." if fields else "",
        *_reproduce_command(results, group, first, names[0]),
    )


def budget_tables(results: Results, group: ProtocolGroup, score: str) -> list[Table]:
    """Returns tables of one score, settings by budgets, for each kind with several budgets."""
    return [_budget_table(results, group, score, budgets) for budgets in group.budgets_by_kind if len(budgets) > 1]


def _budget_table(results: Results, group: ProtocolGroup, score: str, budgets: Sequence[Budget]) -> Table:
    values = [
        [_estimate_score(group.points_at(setting, budget), score) for budget in budgets] for setting in group.settings
    ]
    axes = len(group.axes)
    rows = [(*map(str, setting), *(x or "" for x in row)) for setting, row in zip(group.settings, values)]
    best = {
        (i, axes + j) for j in range(len(budgets)) for i in _best_row([row[j] for row in values], score_sign(score))
    }
    head = (*(axis.label for axis in group.axes), *map(str, budgets))
    first = next(p for p in group.points if score in p.scores and p.budget in budgets)
    title = f"{score_heading(score)} by {budgets[0].unit}"
    return Table(title, head, tuple(rows), frozenset(best), "", *_reproduce_command(results, group, first, score))


def _estimate_score(points: Sequence[Point], score: str) -> Estimate | None:
    values = [point.scores[score].value for point in points if score in point.scores]
    return estimate(values) if values else None


def _best_row(column: Sequence[Estimate | None], sign: int) -> list[int]:
    """Returns the row of the best mean, or no row if fewer than two have a mean."""
    candidates = [(sign * x.mean, -i) for i, x in enumerate(column) if x is not None]
    return [-max(candidates)[1]] if len(candidates) > 1 else []


def _dependent_axes_note(axis: Axis) -> str:
    return f", with {', '.join(f'`{name}`' for name in axis.dependent_fields)}" if axis.dependent_fields else ""


def best_settings(group: ProtocolGroup, score: str) -> Table | None:
    """Returns the best setting at each budget and its lead over the second best, paired by seed."""
    rows = []
    for budget in group.budgets:
        means = [(setting, _estimate_score(group.points_at(setting, budget), score)) for setting in group.settings]
        ranked = [(score_sign(score) * x.mean, -i, setting, x) for i, (setting, x) in enumerate(means) if x is not None]
        if len(ranked) > 1:
            (_, _, best, x), (_, _, second, _) = sorted(ranked, reverse=True)[:2]
            lead = _paired_lead(group, best, second, budget, score)
            rows.append((str(budget), group.label(best), format_number(x.mean), group.label(second), lead or ""))
    if not rows:
        return None
    note = "The lead is a mean over paired seeds. If its interval includes 0, either setting may be the better one."
    return Table(
        f"{score_heading(score)}: best setting at each budget",
        ("budget", "best", "mean", "second best", "lead"),
        tuple(rows),
        note=note,
    )


def _paired_lead(group: ProtocolGroup, best: Setting, second: Setting, budget: Budget, score: str) -> Estimate | None:
    a, b = (
        {p.seed: p.scores[score].value for p in group.points_at(s, budget) if score in p.scores} for s in (best, second)
    )
    leads = [score_sign(score) * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
    return estimate(leads) if leads else None


# ---- the command of a cell


def _reproduce_command(results: Results, group: ProtocolGroup, point: Point, score: str) -> tuple[str, str]:
    """Returns the command that reproduces a point's score, and a caption for it."""
    run = next(run for run in results.runs if run["name"] == point.run)
    sampled = run["evaluations"][point.evaluation_index]["overrides"] | {
        "sample.steps": int(point.cost["solver_steps"])
    }
    config = f"configs/sweeps/{results.name}.py" + (f":{results.variant}" if results.variant else "")
    trained = {"seed": point.seed, "train.steps": run["config"]["train.steps"]} | run["overrides"]
    base = "python -m madformer_jax.main --workdir=runs/cell"
    lines = (
        f"{base} --config={config}{_command_flags(trained)}",
        f"{base} --mode=reference",
        f"{base} --mode=evaluate{_command_flags(sampled)}",
    )
    value = format_number(point.scores[score].value)
    return "\n".join(lines), f"{score} {value}: {group.label(point.setting)} at {point.budget}, seed {point.seed}"


def _command_flags(fields: dict[str, Any]) -> str:
    return "".join(f" --config.{name}={shlex.quote(str(value))}" for name, value in fields.items())


# ---- crossings and costs


def crossing_table(group: ProtocolGroup, score: str, cost: str) -> Table | None:
    """Returns which setting of each pair is better at which cost; None without comparable pairs."""
    crossings = find_crossings(group, score, cost)
    if not crossings:
        return None
    unit, label = (1e9, "GFLOPs") if cost == "flops" else (1.0, COSTS[cost])

    def better(c: Crossing, d: PairedDifference) -> str:
        cost = format_number(d.cost / unit)
        if not d.improvement.mean:
            return f"neither\nat {cost}"
        winner, lead = (c.first, d.improvement) if d.improvement.mean > 0 else (c.second, _negate(d.improvement))
        return f"{group.label(winner)} by {format_number(lead.mean)}\n{format_interval(lead)} at {cost}"

    rows = []
    for c in crossings:
        pair = f"{group.label(c.first)} and {group.label(c.second)}"
        equal_at = format_number(c.equal_cost / unit) if c.equal_cost else ""
        rows.append((pair, _verdict_text(c), equal_at, better(c, c.before), better(c, c.after)))
    head = ("pair", "order", "equal at", "better at lower cost", "better at higher cost")
    return Table(f"{score}: pairwise comparison by {label} per image", head, tuple(rows), note=_PAIRED_NOTE)


def _negate(x: Estimate) -> Estimate:
    low, high = (None, None) if x.low is None or x.high is None else (-x.high, -x.low)
    return Estimate(tuple(-v for v in x.values), -x.mean, low, high)


def _verdict_text(c: Crossing) -> str:
    if c.verdict == "none":
        return f"does not change\nclear at {c.clear[0]} of {c.clear[1]}"
    return "changes\nclear on both sides" if c.verdict == "shown" else "changes\nby the means alone"


def order_change_table(group: ProtocolGroup, scores: Sequence[str]) -> Table | None:
    """Returns how many pairs of settings change their order as the cost grows, by cost and score."""
    rows = []
    for cost, label in COSTS.items():
        cells = []
        for score in scores:
            verdicts = [c.verdict for c in find_crossings(group, score, cost)]
            if verdicts:
                clear, means = verdicts.count("shown"), verdicts.count("means only")
                cells.append(f"{clear} of {len(verdicts)} clearly" + (f"\n{means} by the means alone" if means else ""))
        if cells:
            rows.append((label, *cells))
    note = (
        "The number of pairs of settings whose order changes. Clearly: one setting is better at a lower cost and the "
        "other at a higher cost, and neither 95 % interval (paired by seed) includes 0."
    )
    title = "Which setting wins as the budget grows"
    return Table(title, ("cost per image", *scores), tuple(rows), note=note) if rows else None


def cost_table(group: ProtocolGroup) -> Table:
    """Returns the cost of an image, settings by budgets."""
    rows = []
    for setting in group.settings:
        cells = []
        for budget in group.budgets:
            at = group.points_at(setting, budget)
            cells.append(_cost_cell(at[0]) if at else "")
        rows.append((*map(str, setting), *cells))
    head = (*(axis.label for axis in group.axes), *map(str, group.budgets))
    return Table(
        "Cost per image",
        head,
        tuple(rows),
        note="In order: solver steps; NFE (the paper's count); full-model passes (every layer that runs, those of the clean "
        "tower included); GFLOPs; seconds, if measured.",
    )


def _cost_cell(point: Point) -> str:
    c = point.cost
    seconds = f"; {format_number(c['seconds'])} s" if "seconds" in c else ""
    counts = "; ".join(format_number(c[name]) for name in _COST_COLUMNS)
    return f"{counts}; {format_number(c['flops'] / 1e9)} G{seconds}"


def training_table(results: Results, group: ProtocolGroup) -> Table:
    """Returns the training budget and the final loss of each setting."""
    runs = {run["name"]: run["training"] for run in results.runs}
    rows: dict[tuple[Cell, ...], None] = {}
    for setting in group.settings:
        trainings = [runs[name] for name in dict.fromkeys(point.run for point in group.points_at(setting))]
        first = trainings[0]
        cells = [format_number(first[name]) if name in first else "" for name in ("steps", "images", "flops")]
        loss = estimate(training["final_loss"] for training in trainings)
        rows[(*map(str, setting), *cells, loss)] = None
    head = (*(axis.label for axis in group.axes), "steps", "images", "FLOPs", "final loss")
    return Table("Training", head, tuple(rows))


def run_table(results: Results) -> Table:
    """Returns a table of all runs: name, overrides, seed, evaluations, and hash of the protocol."""
    protocols: dict[str, list[str]] = {}
    for group in results.groups:
        for name in dict.fromkeys(point.run for point in group.points):
            protocols.setdefault(name, []).append(protocol_hash(group.protocol))
    rows = []
    for run in results.runs:
        settings = ", ".join(f"{name} = {value}" for name, value in run["overrides"].items() if name != "seed")
        rows.append(
            (
                run["name"],
                settings,
                str(run["seed"]),
                str(len(run["evaluations"])),
                ", ".join(protocols.get(run["name"], ())),
            )
        )
    return Table("Runs", ("hash", "overrides", "seed", "evaluations", "protocol"), tuple(rows))


# ---- files


def to_csv(results: Results) -> str:
    """Writes a CSV with a line for each score of each point, unrounded."""
    axes = list(dict.fromkeys(axis.field for group in results.groups for axis in group.axes))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["run", "part", *axes, "seed", "budget", "asked", *COSTS, "score", "value", "low", "high", "protocol"]
    )
    for group in results.groups:
        fields = [axis.field for axis in group.axes]
        for p in group.points:
            setting = dict(zip(fields, p.setting))
            for name, score in sorted(p.scores.items()):
                writer.writerow(
                    [
                        p.run,
                        group.name,
                        *(setting.get(f, "") for f in axes),
                        p.seed,
                        *p.budget,
                        *(p.cost.get(c, "") for c in COSTS),
                    ]
                    + [name, *("" if x is None else x for x in score), protocol_hash(group.protocol)]
                )
    return file.getvalue()
