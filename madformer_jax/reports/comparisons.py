"""Differences between settings, paired by seed: at the best step count within a budget, along curves, and of losses.

`answers`, `tables` and `figures` show them. Each function corrects for the number of comparisons that it returns
(`intervals`). "Clear" means that an interval excludes 0 after this correction.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.reports import intervals
from madformer_jax.reports.intervals import Estimate
from madformer_jax.reports.results import Budget, Point, ProtocolGroup, Results, score_sign
from madformer_jax.sweeps.budget import ROUNDING
from madformer_jax.sweeps.protocol import target_fields

Setting = tuple[Any, ...]


class Best(NamedTuple):
    """A setting at its best step count within a budget."""

    steps: int
    values: Mapping[int, float]  # seed -> score


class Difference(NamedTuple):
    """A setting minus another, in units of a score or loss."""

    setting: Setting
    baseline: Setting
    estimate: Estimate  # mean over the seeds that both have, with a simultaneous interval
    steps: tuple[int, int] | None = None  # solver steps of both; None for a loss


def real_scores(group: ProtocolGroup, settings: Sequence[Setting], score: str) -> dict[Setting, Estimate | None]:
    """Returns a score of real images, computed as for each setting; None if it was not stored for any.

    Settings with different values measure different things, and are not compared. The seam score, for
    example, depends on L.
    """
    by_setting = {}
    for setting in settings:
        scores = (point.scores.get(score) for point in group.points_at(setting))
        by_setting[setting] = next((x.real for x in scores if x and x.real), None)
    known = next(filter(None, by_setting.values()), None)
    return {setting: x or known for setting, x in by_setting.items()}


def has_equal_scale(group: ProtocolGroup, settings: Sequence[Setting], score: str) -> bool:
    """Returns whether a score measures the same for all settings, so that one plot can show them."""
    real = list(real_scores(group, settings, score).values())
    return all(x == real[0] for x in real)


def contrasts(group: ProtocolGroup, score: str = "") -> list[tuple[Setting, Setting]]:
    """Returns (setting, baseline) pairs.

    In a grid, the baseline has the first value of an axis and equal values of the others. Otherwise it is
    the base: the most frequent value of each axis, or, if no setting has all of them, the setting that
    differs from the others in the fewest axes. If the score of the base is not comparable, the baseline is
    the comparable setting that differs from the base in the fewest axes.

    Args:
      score: If given, settings without this score are left out. L = 1 has no seam score, for example.
    """
    settings = [s for s in group.settings if not score or any(score in p.scores for p in group.points_at(s))]
    real = real_scores(group, settings, score)
    pairs = []
    if group.is_grid:
        for i, s in itertools.product(range(len(group.axes)), settings):
            same = [b for b in settings if (*b[:i], *b[i + 1 :]) == (*s[:i], *s[i + 1 :]) and real[b] == real[s]]
            pairs += [(s, same[0])] if s != same[0] else []
        return pairs
    base = group.base
    if base not in group.settings:
        base = min(group.settings, key=lambda s: sum(x != y for other in group.settings for x, y in zip(s, other)))
    if base not in settings:
        return []
    for s in settings:
        same = [b for b in settings if real[b] == real[s]]
        baseline = min(same, key=lambda b: sum(x != y for x, y in zip(b, base)))
        pairs += [(s, baseline)] if s != baseline else []
    return pairs


def difference_label(group: ProtocolGroup, setting: Setting, baseline: Setting) -> str:
    """Returns the name of a contrast. In a grid, it names equal values once."""
    if not group.is_grid:
        return f"{group.label(setting)} minus {group.label(baseline)}"
    differing, equal = [], []
    for axis, a, b in zip(group.axes, setting, baseline):
        if a != b:
            word = isinstance(b, str | bool)  # a number alone would read as a part of a calculation
            differing.append(f"{axis.label} = {a} minus {b if word else f'{axis.label} = {b}'}")
        elif len(axis.values) > 1:
            equal.append(f"{axis.label} = {a}")
    return ", ".join(differing) + (f" ({', '.join(equal)})" if equal else "")


def difference_labels(group: ProtocolGroup, pairs: Sequence[tuple[Setting, Setting]]) -> tuple[list[str], str]:
    """Returns the labels of contrasts, and the label of the baseline if all have the same, which they then omit."""
    baselines = {base for _, base in pairs}
    if len(baselines) == 1:
        return [group.label(setting) for setting, _ in pairs], group.label(baselines.pop())
    return [difference_label(group, *pair) for pair in pairs], ""


def best_within(group: ProtocolGroup, setting: Setting, score: str, budget: Budget) -> Best | None:
    """Returns a setting at the step count of its best mean score, among those that cost at most the budget.

    The same step count serves all seeds. It is chosen on the data that are reported, alike for all settings.
    """
    kind = "solver_steps" if budget.kind == "steps" else budget.kind
    by_steps: dict[int, dict[int, float]] = {}
    for point in group.points_at(setting):
        if score in point.scores and kind in point.cost and point.cost[kind] <= budget.amount * (1 + ROUNDING):
            by_steps.setdefault(int(point.cost["solver_steps"]), {})[point.seed] = point.scores[score].value
    most = max(map(len, by_steps.values()), default=0)  # every candidate has all seeds
    candidates = [Best(steps, values) for steps, values in sorted(by_steps.items()) if len(values) == most]
    sign = score_sign(score)
    return max(candidates, key=lambda best: sign * statistics.fmean(best.values.values()), default=None)


def differences_at_best_steps(
    group: ProtocolGroup, score: str, budgets: Iterable[Budget]
) -> dict[Budget, list[Difference]]:
    """Returns the differences of all contrasts at each budget. Holm's procedure covers all of them together."""
    keys: list[tuple[Budget, Setting, Setting, tuple[int, int]]] = []
    samples: list[list[float]] = []
    for budget, (setting, baseline) in itertools.product(budgets, contrasts(group, score)):
        a, b = (best_within(group, s, score, budget) for s in (setting, baseline))
        if a and b and (values := paired(a.values, b.values)):
            keys.append((budget, setting, baseline, (a.steps, b.steps)))
            samples.append(values)
    out: dict[Budget, list[Difference]] = {}
    for (budget, setting, baseline, steps), x in zip(keys, intervals.holm(samples)):
        out.setdefault(budget, []).append(Difference(setting, baseline, x, steps))
    return out


def along_budgets(
    group: ProtocolGroup, score: str, budgets: Sequence[Budget], pair: tuple[Setting, Setting], tests: int
) -> list[tuple[Budget, Difference]]:
    """Returns the difference of a pair (setting, baseline) at each budget, with a simultaneous band over the budgets.

    The budgets have one kind and are in order. The bands of `tests` pairs hold together.
    """
    rows: list[tuple[Budget, tuple[int, int], dict[int, float]]] = []
    for budget in budgets:
        a, b = (best_within(group, s, score, budget) for s in pair)
        if a and b and (seeds := a.values.keys() & b.values.keys()):
            rows.append((budget, (a.steps, b.steps), {s: a.values[s] - b.values[s] for s in sorted(seeds)}))
    shared = sorted(set.intersection(*(set(values) for _, _, values in rows))) if rows else []
    if not shared:
        return []
    band = intervals.max_t([[values[seed] for seed in shared] for _, _, values in rows], tests)
    return [(budget, Difference(*pair, x, steps)) for (budget, steps, _), x in zip(rows, band)]


class Crossing(NamedTuple):
    """Comparison of two settings as the budget grows."""

    pair: tuple[Setting, Setting]
    # "shown" if one is clearly better at a smaller and the other at a larger budget. "means only" if only the means
    # change order. "none" if they do not.
    verdict: str
    clear: tuple[int, int]  # budgets with a clear difference, and all budgets
    before: tuple[Budget, Difference]  # the clear difference at the smallest budget, else the difference there
    after: tuple[Budget, Difference]  # the same at the largest budget


def find_crossings(group: ProtocolGroup, score: str, budgets: Sequence[Budget]) -> list[Crossing]:
    """Compares every two settings that differ in exactly one axis at several budgets of one kind.

    The bands of all pairs hold together: at most 5 % of tables of settings without differences show any
    clear difference.
    """
    real = real_scores(group, group.settings, score)
    pairs = [
        (a, b)
        for a, b in itertools.combinations(group.settings, 2)
        if sum(x != y for x, y in zip(a, b)) == 1 and real[a] == real[b]
    ]
    out = []
    for pair in pairs:
        rows = along_budgets(group, score, budgets, pair, len(pairs))
        if len(rows) > 1:
            clear = [row for row in rows if row[1].estimate.sign]
            signs = {row[1].estimate.sign for row in clear}
            means = {row[1].estimate.mean > 0 for row in rows if row[1].estimate.mean}
            verdict = "shown" if len(signs) == 2 else "means only" if len(means) == 2 else "none"
            out.append(Crossing(pair, verdict, (len(clear), len(rows)), (clear or rows)[0], (clear or rows)[-1]))
    return out


# ---- losses


def training_losses(run: Mapping[str, Any]) -> dict[str, float]:
    """Returns the losses of a run: name -> mean over the last quarter of the training steps.

    The curve of a result has a mean for each window of steps. A window lacks the loss of a quarter of the
    timesteps that it did not draw. A validation loss has the prefix "held_out_". Scores of `evaluate.held_out_n`
    keep their names, and replace validation losses of the same name.
    """
    curve = run["training"]["curve"]
    rows = [row for row in curve if row["step"] > 0.75 * curve[-1]["step"]]
    names = dict.fromkeys(name for row in reversed(rows) for name in row if name.startswith("loss"))
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    means = {name: math.fsum(values) / len(values) for name, values in columns.items()}
    return (
        means
        | {f"held_out_{name}": value for name, value in run["training"].get("held_out", {}).items()}
        | {name: score["value"] for name, score in run.get("held_out", {}).items()}
    )


def is_first_evaluation(run: Mapping[str, Any], point: Point) -> bool:
    """Returns whether a point has the overrides of its run's first evaluation."""
    evaluations = run["evaluations"]
    return evaluations[point.evaluation_index]["overrides"] == evaluations[0]["overrides"]


def losses(results: Results, group: ProtocolGroup, name: str) -> dict[Setting, dict[int, float]]:
    """Returns a loss of each setting and seed (`training_losses`); empty if no run has it.

    A run has one loss. It belongs to the setting of its first evaluation: held-out scores have its overrides.
    """
    runs = {run["name"]: run for run in results.runs}
    by_setting: dict[Setting, dict[int, float]] = {}
    for point in group.points:
        if is_first_evaluation(runs[point.run], point) and point.seed not in by_setting.get(point.setting, {}):
            value = training_losses(runs[point.run]).get(name)
            if value is not None:
                by_setting.setdefault(point.setting, {})[point.seed] = value
    return by_setting


def comparable_losses(group: ProtocolGroup, pair: tuple[Setting, Setting], name: str) -> bool:
    """Returns whether a loss measures the same target for two settings."""
    changed = [axis for axis, a, b in zip(group.axes, *pair) if a != b]
    return not any({axis.field, *axis.dependent_fields} & set(target_fields(name)) for axis in changed)


def loss_differences(results: Results, group: ProtocolGroup, name: str) -> list[Difference]:
    """Returns the differences of a loss for all contrasts with a common target, under Holm's procedure.

    Bits per dimension measure the same target for all settings.
    """
    by_setting = losses(results, group, name)
    pairs = [p for p in contrasts(group) if all(s in by_setting for s in p) and comparable_losses(group, p, name)]
    samples = [(pair, paired(by_setting[pair[0]], by_setting[pair[1]])) for pair in pairs]
    samples = [(pair, values) for pair, values in samples if values]
    return [Difference(*pair, x) for (pair, _), x in zip(samples, intervals.holm([values for _, values in samples]))]


def quarter_loss_differences(results: Results, group: ProtocolGroup) -> list[tuple[Difference, ...]]:
    """Returns, for each contrast, the differences of the image loss in the four quarters of the timesteps.

    Their bands over the quarters hold together for all contrasts.
    """
    quarters = [losses(results, group, f"loss_q{i}") for i in (1, 2, 3, 4)]
    pairs = [
        pair
        for pair in contrasts(group)
        if comparable_losses(group, pair, "loss_image") and all(s in quarter for quarter in quarters for s in pair)
    ]
    out = []
    for a, b in pairs:
        seeds = set.intersection(*(set(quarter[s]) for quarter in quarters for s in (a, b)))
        if seeds:
            samples = [[quarter[a][seed] - quarter[b][seed] for seed in sorted(seeds)] for quarter in quarters]
            out.append(tuple(Difference(a, b, x) for x in intervals.max_t(samples, len(pairs))))
    return out


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    """Returns a - b for the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
