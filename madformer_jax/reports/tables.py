"""The tables of a report: scores, differences, crossings, losses and costs; and all points as CSV.

`report_sections` arranges the tables. Below each table of scores is a command that reproduces one of
its cells.
"""

import csv
import io
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from madformer_jax.reports import comparisons
from madformer_jax.reports.axes import Axis
from madformer_jax.reports.comparisons import Difference, Setting
from madformer_jax.reports.formatting import (
    Annotated,
    Cell,
    Table,
    format_interval,
    format_mean,
    format_number,
    score_heading,
)
from madformer_jax.reports.intervals import Estimate, estimate
from madformer_jax.reports.results import (
    COSTS,
    Budget,
    Point,
    ProtocolGroup,
    Results,
    protocol_hash,
    score_estimate,
    score_sign,
)

# `comparisons.Crossing.verdict` in words.
_ORDERS = {
    "shown": "changes, clear on both sides", "means only": "changes by the means alone", "none": "does not change",
}  # fmt: skip
# The last columns of a table of scores.
_COST_COLUMNS = {"solver_steps": "solver steps", "nfe": "NFE", "passes": "passes"}
_CLEAR_NOTE = "Bold: the interval excludes 0. If no setting differs, at most 5 % of such tables have a bold cell"
_HOLM_NOTE = f"Differences are means over paired seeds. {_CLEAR_NOTE} (Holm, over all cells of the table)."


def _title(group: ProtocolGroup, title: str) -> str:
    """Returns the heading of a table, with the data and the number of images."""
    return f"{title} ({group.data}, n = {group.protocol.get('n')})" if group.data else title


# ---- scores


def axis_tables(results: Results, group: ProtocolGroup) -> list[Table]:
    """Returns tables in the paper's form: all scores for each value of an axis.

    Each kind of budget contributes its largest budget with scores. A grid has a table for each axis; a base and its
    ablations have one table.
    """
    axes = group.axes
    varied = [i for i, axis in enumerate(axes) if len(axis.values) > 1]
    tables = []
    scored = {point.budget for point in group.points if point.scores}
    kinds = [[budget for budget in kind if budget in scored] for kind in group.budgets_by_kind]
    for budget in (kind[-1] for kind in kinds if kind):
        if len(varied) < 2 or not group.is_grid:
            label = ", ".join(axes[i].label for i in varied) or "Scores"
            title = _title(group, f"{label}, at {budget}")
            tables.append(_score_table(results, group, title, group.settings, range(len(axes)), budget))
            continue
        for i in varied:
            order = [*(j for j in varied if j != i), i]
            settings = sorted(group.settings, key=lambda s: [axes[j].values.index(s[j]) for j in order])
            title = _title(group, f"{axes[i].label}, at {budget}")
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
    """Builds a table with a row for each setting and the axes in an order of columns.

    Only rows that agree in the first `shared_columns` compete for the best mean.
    """
    shown = [group.axes[i] for i in order]
    names = [
        name for name in group.scores if any(name in p.scores for s in settings for p in group.points_at(s, budget))
    ]
    real = [comparisons.real_scores(group, settings, name) for name in names]
    rows, values = [], []
    for setting in settings:
        at = group.points_at(setting, budget)
        values.append([score_estimate(at, name) for name in names])
        labels = [str(setting[group.axes.index(axis)]) for axis in shown] or [group.label(setting)]
        costs = [format_number(at[0].cost[name]) if at and name in at[0].cost else "" for name in _COST_COLUMNS]
        rows.append((*labels, *(x or "" for x in values[-1]), *costs))
    heads = [axis.label for axis in shown] or ["setting"]
    best = set()
    for j, name in enumerate(names):
        groups = [(row[:shared_columns], real[j][setting]) for row, setting in zip(rows, settings)]
        for g in dict.fromkeys(groups):
            column = [row[j] if other == g else None for row, other in zip(values, groups)]
            best |= {(i, len(heads) + j) for i in _best_row(column, score_sign(name))}
    rows += _real_rows(group, real, len(heads))
    head = (*heads, *map(score_heading, names), *_COST_COLUMNS.values())
    fields = "; ".join(f"{axis.label} is `{axis.field}`" + _dependent_axes_note(axis) for axis in shown)
    first = next(p for s in settings for p in group.points_at(s, budget) if names[0] in p.scores)
    command = _reproduce_command(results, group, first, names[0])
    return Table(title, head, tuple(rows), frozenset(best), f"{fields}." if fields else "", *command)


def _real_rows(
    group: ProtocolGroup, real: Sequence[Mapping[Setting, Estimate | None]], labels: int
) -> Iterator[tuple[str, ...]]:
    """Yields rows of real images at the same n, with bootstrap intervals: one, or one for each L if a score depends on L.

    Args:
      group: Its axes name the rows.
      real: For each score, that of real images by setting.
      labels: Number of columns with labels.
    """
    by_setting = {setting: tuple(scores[setting] for scores in real) for setting in real[0]}
    for row in dict.fromkeys(by_setting.values()):
        alike = [setting for setting, other in by_setting.items() if other == row]
        shared = [
            f"{axis.label} = {values.pop()}"
            for axis, values, every in zip(group.axes, map(set, zip(*alike)), map(set, zip(*by_setting)))
            if len(values) == 1 < len(every)
        ]
        label = f"real images ({', '.join(shared)})" if shared and len(alike) < len(by_setting) else "real images"
        cells = ["not stored" if x is None else format_mean(x) for x in row]
        yield (label, *[""] * (labels - 1), *cells, *[""] * len(_COST_COLUMNS))


def budget_tables(results: Results, group: ProtocolGroup, score: str) -> list[Table]:
    """Returns tables of one score, settings by budgets, for each kind with several budgets."""
    tables, axes = [], len(group.axes)
    for budgets in (kind for kind in group.budgets_by_kind if len(kind) > 1):
        first = next((p for p in group.points if score in p.scores and p.budget in budgets), None)
        if first is None:
            continue
        values = [[score_estimate(group.points_at(s, budget), score) for budget in budgets] for s in group.settings]
        rows = [(*map(str, setting), *(x or "" for x in row)) for setting, row in zip(group.settings, values)]
        columns = enumerate(zip(*values), axes)
        best = {(i, j) for j, column in columns for i in _best_row(column, score_sign(score))}
        head = (*(axis.label for axis in group.axes), *map(str, budgets))
        title = _title(group, f"{score_heading(score)} by {budgets[0].unit}")
        command = _reproduce_command(results, group, first, score)
        tables.append(Table(title, head, tuple(rows), frozenset(best), "", *command))
    return tables


def _best_row(column: Sequence[Estimate | None], sign: int) -> list[int]:
    """Returns the row of the best mean, or no row if fewer than two have a mean."""
    candidates = [(sign * x.mean, -i) for i, x in enumerate(column) if x is not None]
    return [-max(candidates)[1]] if len(candidates) > 1 else []


def _dependent_axes_note(axis: Axis) -> str:
    return f", with {', '.join(f'`{name}`' for name in axis.dependent_fields)}" if axis.dependent_fields else ""


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


# ---- differences


def difference_tables(group: ProtocolGroup, score: str) -> list[Table]:
    """Returns the differences to the baselines at the best step count within each budget, a table for each kind."""
    tables = []
    for budgets in group.budgets_by_kind:
        differences = comparisons.differences_at_best_steps(group, score, budgets)
        rows = _difference_rows(group, [differences.get(budget, []) for budget in budgets])
        if rows:
            title = _title(group, f"{score_heading(score)}: differences at the best step count within each budget")
            note = (
                f"{_HOLM_NOTE} Each setting uses the step count with its best mean within the budget; both are shown."
            )
            tables.append(Table(title, ("difference", *map(str, budgets)), *_bold_clear(rows), note=note))
    return tables


def _difference_rows(group: ProtocolGroup, columns: Sequence[Sequence[Difference]]) -> list[list[Cell]]:
    """Returns a row for each contrast: its label and its difference in each column."""
    rows: dict[str, list[Cell]] = {}
    for j, column in enumerate(columns):
        for d in column:
            label = comparisons.difference_label(group, d.setting, d.baseline)
            cells = rows.setdefault(label, [label, *[""] * len(columns)])
            cells[1 + j] = Annotated(d.estimate, f"{d.steps[0]} and {d.steps[1]} steps" if d.steps else "")
    return list(rows.values())


def _bold_clear(rows: Sequence[Sequence[Cell]]) -> tuple[tuple[tuple[Cell, ...], ...], frozenset[tuple[int, int]]]:
    clear = {
        (i, j)
        for i, row in enumerate(rows)
        for j, cell in enumerate(row)
        if isinstance(cell, Annotated) and cell.estimate.sign
    }
    return tuple(map(tuple, rows)), frozenset(clear)


def loss_tables(results: Results, group: ProtocolGroup) -> list[Table]:
    """Returns the image loss of each setting with its differences, held out and of training, and by quarter."""
    tables = []
    held_out = ("bits_per_dimension", "Bits per dimension"), ("held_out_loss_image", "Held-out image loss")
    for name, title in (*held_out, ("loss_image", "Image loss of training")):
        differences = comparisons.loss_differences(results, group, name)
        if differences:
            by_setting = comparisons.losses(results, group, name)
            baselines = dict.fromkeys(d.baseline for d in differences)
            rows: list[list[Cell]] = []
            for setting, values in by_setting.items():
                changes: list[Cell] = [
                    Annotated(
                        d.estimate,
                        _percent(d, by_setting) + f" against {group.label(d.baseline)}" * (len(baselines) > 1),
                    )
                    for d in differences
                    if d.setting == setting
                ]
                # A setting without a difference is a baseline or has a loss of its own kind.
                for change in changes or ["baseline" if setting in baselines else ""]:
                    rows.append([group.label(setting), estimate(values.values()), change])
            note = f"{_HOLM_NOTE} Losses of training are means over the last quarter of the steps."
            header = ("setting", "loss", "difference to the baseline")
            tables.append(Table(f"{title} ({group.data})", header, *_bold_clear(rows), note=note))
    if quarters := comparisons.quarter_loss_differences(results, group):
        rows = [row for q in quarters for row in _difference_rows(group, [[d] for d in q])]
        columns = ("difference", "q1: least noise", "q2", "q3", "q4: most noise")
        note = f"{_CLEAR_NOTE} (max-t over the quarters, Bonferroni over the rows)."
        tables.append(
            Table(f"Image loss by quarter of the timesteps ({group.data})", columns, *_bold_clear(rows), note=note)
        )
    return tables


def _percent(d: Difference, losses: dict[Setting, dict[int, float]]) -> str:
    base = losses[d.baseline].values()
    return f"{d.estimate.mean / (sum(base) / len(base)):+.1%}"


def crossing_tables(group: ProtocolGroup, score: str) -> list[Table]:
    """Returns which setting of each pair is better at which budget, a table for each kind with several budgets."""
    tables = []
    for budgets in group.budgets_by_kind:
        if crossings := comparisons.find_crossings(group, score, budgets):
            rows = []
            for c in crossings:
                pair = " and ".join(map(group.label, c.pair))
                order = f"{_ORDERS[c.verdict]}\nclear at {c.clear[0]} of {c.clear[1]}"
                rows.append((pair, order, _better(group, score, c.before), _better(group, score, c.after)))
            title = _title(
                group, f"{score_heading(score)}: which setting wins as the budget of {budgets[0].unit} grows"
            )
            head = ("pair", "order", "first clear, else smallest budget", "last clear, else largest budget")
            note = (
                "Each setting counts with its best step count within the budget. A difference is clear if its band "
                f"excludes 0 (max-t over {len(budgets)} budgets, Bonferroni over {len(crossings)} pairs). If no setting "
                "differs, at most 5 % of such tables have a clear difference."
            )
            tables.append(Table(title, head, tuple(rows), note=note))
    return tables


def _better(group: ProtocolGroup, score: str, at: tuple[Budget, Difference]) -> str:
    budget, d = at
    sign = score_sign(score)
    if not d.estimate.mean:
        return f"neither\nat {budget}"
    winner = d.setting if sign * d.estimate.mean > 0 else d.baseline
    lead = d.estimate if d.estimate.mean > 0 else _negate(d.estimate)
    return f"{group.label(winner)} by {format_number(lead.mean)}\n{format_interval(lead)} at {budget}"


def _negate(x: Estimate) -> Estimate:
    low, high = (None, None) if x.low is None or x.high is None else (-x.high, -x.low)
    return Estimate(tuple(-v for v in x.values), -x.mean, low, high)


# ---- costs


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
    note = (
        "In order: solver steps; NFE (the paper's count); full-model passes (every layer that runs, those of the clean "
        "tower included); GFLOPs; seconds, if measured."
    )
    return Table(_title(group, "Cost per image"), head, tuple(rows), note=note)


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
    return Table(f"Training ({group.data})", head, tuple(rows))


def run_table(results: Results) -> Table:
    """Returns a table of all runs: name, overrides, seed, evaluations, and hash of the protocol."""
    protocols: dict[str, list[str]] = {}
    for group in results.groups:
        for name in dict.fromkeys(point.run for point in group.points):
            protocols.setdefault(name, []).append(protocol_hash(group.protocol))
    rows = []
    for run in results.runs:
        settings = ", ".join(f"{name} = {value}" for name, value in run["overrides"].items() if name != "seed")
        hashes = ", ".join(protocols.get(run["name"], ()))
        rows.append((run["name"], settings, str(run["seed"]), str(len(run["evaluations"])), hashes))
    return Table("Runs", ("run", "overrides", "seed", "evaluations", "protocol"), tuple(rows))


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
        protocol = protocol_hash(group.protocol)
        for p in group.points:
            setting = {axis.field: value for axis, value in zip(group.axes, p.setting)}
            row = [p.run, group.name, *(setting.get(name, "") for name in axes), p.seed, *p.budget]
            row += [p.cost.get(cost, "") for cost in COSTS]
            for name, score in sorted(p.scores.items()):
                writer.writerow([*row, name, *("" if x is None else x for x in score[:3]), protocol])
    return file.getvalue()
