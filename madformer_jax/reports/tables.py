"""The tables of a sweep: in the paper's form, by budget, of crossings and of costs; and all points as CSV.

Under a table of scores stands the command that makes one of its cells.
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
_COST_COLUMNS = {"solver_steps": "solver steps", "nfe": "NFE", "passes": "passes"}  # costs beside the scores of a table
_PAIRED_NOTE = (
    "By how much the better one is better: the mean over the seeds that both have of the difference at a cost, with its t-interval. "
    "Between its points a curve's score is linear in the logarithm of the cost. Clear: the interval does not hold 0."
)


# ---- scores


def axis_tables(results: Results, part: ProtocolGroup) -> list[Table]:
    """The paper's tables: for each axis its values, with all scores, at the largest budget of each kind.

    Settings that are no grid (a base and its ablations) are one table.
    """
    axes = part.axes
    varied = [i for i, axis in enumerate(axes) if len(axis.values) > 1]
    tables = []
    for budget in (kind[-1] for kind in part.kinds):
        if len(varied) < 2 or not part.is_grid:
            label = ", ".join(axes[i].label for i in varied) or "One setting"
            tables.append(_score_table(results, part, f"{label}, at {budget}", part.settings, range(len(axes)), budget))
            continue
        for i in varied:
            order = [*(j for j in varied if j != i), i]
            settings = sorted(part.settings, key=lambda s: [axes[j].values.index(s[j]) for j in order])
            title = f"{axes[i].label}, at {budget}"
            tables.append(_score_table(results, part, title, settings, order, budget, len(order) - 1))
    return tables


def _score_table(
    results: Results,
    part: ProtocolGroup,
    title: str,
    settings: Sequence[Setting],
    order: Iterable[int],
    budget: Budget,
    group: int = 0,
) -> Table:
    """Rows of settings, the axes in an order; the first `group` of them must agree in what compares."""
    shown = [part.axes[i] for i in order]
    names = [name for name in part.scores if any(name in p.scores for s in settings for p in part.at(s, budget))]
    rows, values = [], []
    for setting in settings:
        at = part.at(setting, budget)
        values.append([_estimate_score(at, name) for name in names])
        labels = [str(setting[part.axes.index(axis)]) for axis in shown]
        costs = [format_number(at[0].cost[name]) if at and name in at[0].cost else "" for name in _COST_COLUMNS]
        rows.append((*labels, *(x or "" for x in values[-1]), *costs))
    groups = [row[:group] for row in rows]
    best = {
        (i, len(shown) + j)
        for j, name in enumerate(names)
        for g in dict.fromkeys(groups)
        for i in _best_row([row[j] if groups[k] == g else None for k, row in enumerate(values)], score_sign(name))
    }
    head = (*(axis.label for axis in shown), *map(score_heading, names), *_COST_COLUMNS.values())
    fields = "; ".join(f"{axis.label} is `{axis.field}`" + _dependent_axes_note(axis) for axis in shown)
    first = next(p for s in settings for p in part.at(s, budget))
    return Table(
        title,
        head,
        tuple(rows),
        frozenset(best),
        f"{fields}." if fields else "",
        *_reproduce_command(results, part, first, names[0]),
    )


def budget_tables(results: Results, part: ProtocolGroup, score: str) -> list[Table]:
    """One score: settings down, budgets across; for each kind of budget that has several."""
    return [_budget_table(results, part, score, budgets) for budgets in part.kinds if len(budgets) > 1]


def _budget_table(results: Results, part: ProtocolGroup, score: str, budgets: Sequence[Budget]) -> Table:
    values = [[_estimate_score(part.at(setting, budget), score) for budget in budgets] for setting in part.settings]
    axes = len(part.axes)
    rows = [(*map(str, setting), *(x or "" for x in row)) for setting, row in zip(part.settings, values)]
    best = {
        (i, axes + j) for j in range(len(budgets)) for i in _best_row([row[j] for row in values], score_sign(score))
    }
    head = (*(axis.label for axis in part.axes), *map(str, budgets))
    first = next(p for p in part.points if score in p.scores and p.budget in budgets)
    title = f"{score_heading(score)} by {budgets[0].unit}"
    return Table(title, head, tuple(rows), frozenset(best), "", *_reproduce_command(results, part, first, score))


def _estimate_score(points: Sequence[Point], score: str) -> Estimate | None:
    values = [point.scores[score].value for point in points if score in point.scores]
    return estimate(values) if values else None


def _best_row(column: Sequence[Estimate | None], sign: int) -> list[int]:
    """The place of the best mean, where there are two to choose from."""
    there = [(sign * x.mean, -i) for i, x in enumerate(column) if x is not None]
    return [-max(there)[1]] if len(there) > 1 else []


def _dependent_axes_note(axis: Axis) -> str:
    return f", with {', '.join(f'`{name}`' for name in axis.follows)}" if axis.follows else ""


def best_settings(part: ProtocolGroup, score: str) -> Table | None:
    """For each budget the best setting, and by how much it is better than the next, seed by seed."""
    rows = []
    for budget in part.budgets:
        means = [(setting, _estimate_score(part.at(setting, budget), score)) for setting in part.settings]
        there = [(score_sign(score) * x.mean, -i, setting, x) for i, (setting, x) in enumerate(means) if x is not None]
        if len(there) > 1:
            (_, _, best, x), (_, _, second, _) = sorted(there, reverse=True)[:2]
            by = _paired_lead(part, best, second, budget, score)
            rows.append((str(budget), part.label(best), format_number(x.mean), part.label(second), by or ""))
    if not rows:
        return None
    note = "The difference is taken seed by seed; an interval that holds 0 leaves open which of the two is better."
    return Table(
        f"{score_heading(score)}: the best at each budget",
        ("budget", "best", "its mean", "next", "better by"),
        tuple(rows),
        note=note,
    )


def _paired_lead(part: ProtocolGroup, best: Setting, second: Setting, budget: Budget, score: str) -> Estimate | None:
    a, b = ({p.seed: p.scores[score].value for p in part.at(s, budget) if score in p.scores} for s in (best, second))
    by = [score_sign(score) * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
    return estimate(by) if by else None


# ---- the command of a cell


def _reproduce_command(results: Results, part: ProtocolGroup, point: Point, score: str) -> tuple[str, str]:
    """The command that makes the first seed's value in a cell, and what it makes."""
    run = next(run for run in results.runs if run["name"] == point.run)
    sampled = run["evaluations"][point.place]["overrides"] | {"sample.steps": int(point.cost["solver_steps"])}
    config = f"configs/sweeps/{results.name}.py" + (f":{results.variant}" if results.variant else "")
    trained = {"seed": point.seed, "train.steps": run["config"]["train.steps"]} | run["overrides"]
    base = "python -m madformer_jax.main --workdir=runs/cell"
    lines = (
        f"{base} --config={config}{_command_flags(trained)}",
        f"{base} --mode=reference",
        f"{base} --mode=evaluate{_command_flags(sampled)}",
    )
    value = format_number(point.scores[score].value)
    return "\n".join(lines), f"{score} {value}: {part.label(point.setting)} at {point.budget}, seed {point.seed}"


def _command_flags(fields: dict[str, Any]) -> str:
    return "".join(f" --config.{name}={shlex.quote(str(value))}" for name, value in fields.items())


# ---- crossings and costs


def crossing_table(part: ProtocolGroup, score: str, cost: str) -> Table | None:
    """Every pair of settings: which is better where, and whether the order changes."""
    found = find_crossings(part, score, cost)
    if not found:
        return None
    unit, of = (1e9, "GFLOPs") if cost == "flops" else (1.0, COSTS[cost])

    def better(c: Crossing, d: PairedDifference) -> str:
        if not d.by.mean:
            return f"neither\nat {format_number(d.cost / unit)}"
        winner, by = (c.first, d.by) if d.by.mean > 0 else (c.second, _negate(d.by))
        return (
            f"{part.label(winner)} by {format_number(by.mean)}\n{format_interval(by)} at {format_number(d.cost / unit)}"
        )

    rows = [
        (
            f"{part.label(c.first)} and {part.label(c.second)}", _verdict_text(c), format_number(c.at / unit) if c.at else "",
            better(c, c.before), better(c, c.after),
        )
        for c in found
    ]  # fmt: skip
    head = ("pair", "order", "equal at", "better at less", "better at more")
    return Table(f"{score}: order of pairs against {of} an image", head, tuple(rows), note=_PAIRED_NOTE)


def _negate(x: Estimate) -> Estimate:
    low, high = (None, None) if x.low is None or x.high is None else (-x.high, -x.low)
    return Estimate(tuple(-v for v in x.values), -x.mean, low, high)


def _verdict_text(c: Crossing) -> str:
    if c.verdict == "none":
        return f"the same\nclear at {c.clear[0]} of {c.clear[1]}"
    return "changes\nclear on both sides" if c.verdict == "shown" else "changes\nby the means alone"


def order_change_table(part: ProtocolGroup, scores: Sequence[str]) -> Table | None:
    """How many pairs of settings change their order as the cost grows, for each kind of cost and some scores."""
    rows = []
    for cost, label in COSTS.items():
        cells = []
        for score in scores:
            found = [c.verdict for c in find_crossings(part, score, cost)]
            if found:
                clear, means = found.count("shown"), found.count("means only")
                cells.append(f"{clear} of {len(found)} clearly" + (f"\n{means} by the means alone" if means else ""))
        if cells:
            rows.append((label, *cells))
    note = "Clearly: one is better at a lower cost and the other at a higher one, by 95 % intervals, paired by seed, that hold no 0."
    title = "Pairs that change order as an image may cost more"
    return Table(title, ("cost an image", *scores), tuple(rows), note=note) if rows else None


def cost_table(part: ProtocolGroup) -> Table:
    """What an image costs: settings down, budgets across."""
    rows = []
    for setting in part.settings:
        cells = []
        for budget in part.budgets:
            at = part.at(setting, budget)
            cells.append(_cost_cell(at[0]) if at else "")
        rows.append((*map(str, setting), *cells))
    head = (*(axis.label for axis in part.axes), *map(str, part.budgets))
    return Table(
        "What an image costs",
        head,
        tuple(rows),
        note="Solver steps; NFE, the paper's count; full-model passes, which count every layer that runs, the clean tower's "
        "among them; GFLOPs; seconds where measured.",
    )


def _cost_cell(point: Point) -> str:
    c = point.cost
    seconds = f"; {format_number(c['seconds'])} s" if "seconds" in c else ""
    counts = "; ".join(format_number(c[name]) for name in _COST_COLUMNS)
    return f"{counts}; {format_number(c['flops'] / 1e9)} G{seconds}"


def training_table(results: Results, part: ProtocolGroup) -> Table:
    """What each setting was trained for, and where its loss came to."""
    runs = {run["name"]: run["training"] for run in results.runs}
    rows: dict[tuple[Cell, ...], None] = {}
    for setting in part.settings:
        found = [runs[name] for name in dict.fromkeys(point.run for point in part.at(setting))]
        cells = [format_number(found[0][name]) if name in found[0] else "" for name in ("steps", "images", "flops")]
        loss = estimate(one["final_loss"] for one in found)
        rows[(*map(str, setting), *cells, loss)] = None
    head = (*(axis.label for axis in part.axes), "steps", "images", "FLOPs", "final loss")
    return Table("What was trained", head, tuple(rows))


def run_table(results: Results) -> Table:
    """Every run with its hash, what sets it apart, and the protocols of its scores."""
    protocols: dict[str, list[str]] = {}
    for part in results.parts:
        for name in dict.fromkeys(point.run for point in part.points):
            protocols.setdefault(name, []).append(protocol_hash(part.protocol))
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
    """A line for each score of each point, unrounded."""
    axes = list(dict.fromkeys(axis.field for part in results.parts for axis in part.axes))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["run", "part", *axes, "seed", "budget", "asked", *COSTS, "score", "value", "low", "high", "protocol"]
    )
    for part in results.parts:
        fields = [axis.field for axis in part.axes]
        for p in part.points:
            setting = dict(zip(fields, p.setting))
            for name, score in sorted(p.scores.items()):
                writer.writerow(
                    [
                        p.run,
                        part.name,
                        *(setting.get(f, "") for f in axes),
                        p.seed,
                        *p.budget,
                        *(p.cost.get(c, "") for c in COSTS),
                    ]
                    + [name, *("" if x is None else x for x in score), protocol_hash(part.protocol)]
                )
    return file.getvalue()
