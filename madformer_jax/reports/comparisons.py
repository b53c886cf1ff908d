"""Pairwise comparison of settings: which one is better at which cost, and whether their order changes.

`tables.crossing_table` and `tables.order_change_table` show the result of `find_crossings`. The paper
makes this comparison for D in its finding 2 (Figure 4); here it comes with t-intervals over seeds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.reports.results import Estimate, ProtocolGroup, estimate, score_sign

SeedCurves = Mapping[int, Sequence[tuple[float, float]]]  # seed -> (cost, score) pairs, sorted by cost


class PairedDifference(NamedTuple):
    """Improvement of the first of two settings over the second at a cost, paired by seed."""

    cost: float
    improvement: Estimate

    @property
    def sign(self) -> int:
        """1 if the first setting is clearly better, -1 if the second is, 0 if neither is clear."""
        low, high = self.improvement.low, self.improvement.high
        return 0 if low is None or high is None else (low > 0) - (high < 0)


class Crossing(NamedTuple):
    """Comparison of two settings as the cost grows.

    Attributes:
      first: The value of each axis in the first setting.
      second: The same for the second setting.
      verdict: "shown" if the order changes and intervals exclude 0 on both sides. "means only" if the
        means change order but an interval includes 0. "none" if the order never changes.
      equal_cost: Cost at which the mean difference is 0; None if the order never changes.
      before: A difference at lower cost: the last clear one if shown, else the largest of the means.
      after: A difference at higher cost, chosen likewise.
      clear: Number of costs at which the interval excludes 0, and number of all costs.
    """

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    verdict: str
    equal_cost: float | None
    before: PairedDifference
    after: PairedDifference
    clear: tuple[int, int]


def seed_curves(group: ProtocolGroup, setting: tuple[Any, ...], score: str, cost: str) -> SeedCurves:
    """Returns the curve of a setting for each seed, without points whose cost was not measured."""
    curves: dict[int, dict[float, float]] = {}
    for point in group.points_at(setting):
        if cost in point.cost and score in point.scores:
            curves.setdefault(point.seed, {})[point.cost[cost]] = point.scores[score].value
    return {seed: sorted(values.items()) for seed, values in curves.items()}


def paired_differences(first: SeedCurves, second: SeedCurves, sign: int) -> list[PairedDifference]:
    """Returns the improvement of the first setting at every cost at which either has a point.

    Costs outside of the other setting's curves are left out. Between two points of a curve the score is
    linear in the logarithm of the cost.

    Args:
      first: The curves of the first setting.
      second: The curves of the second setting.
      sign: 1 if a larger score is better, else -1.
    """
    costs = sorted({x for c in (first, second) for points in c.values() for x, _ in points})
    out = []
    for cost in costs:
        pairs = [
            (interpolate(first[s], cost), interpolate(second[s], cost)) for s in sorted(first.keys() & second.keys())
        ]
        improvements = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
        if improvements:
            out.append(PairedDifference(cost, estimate(improvements)))
    return out


def interpolate(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Returns the score of a curve at a cost, or None outside of the curve."""
    if not points[0][0] <= cost <= points[-1][0]:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= cost < x1:
            share = math.log(cost / x0) / math.log(x1 / x0)
            return y0 + share * (y1 - y0)
    return points[-1][1]


def find_crossings(group: ProtocolGroup, score: str, cost: str) -> list[Crossing]:
    """Compares every two settings that differ in exactly one axis and share at least two costs."""
    out = []
    for a, b in itertools.combinations(group.settings, 2):
        if sum(x != y for x, y in zip(a, b)) == 1:
            differences = paired_differences(
                seed_curves(group, a, score, cost), seed_curves(group, b, score, cost), score_sign(score)
            )
            if len(differences) > 1:
                out.append(_classify_crossing(a, b, differences))
    return out


def _classify_crossing(
    first: tuple[Any, ...], second: tuple[Any, ...], differences: Sequence[PairedDifference]
) -> Crossing:
    clear_indices = [i for i, d in enumerate(differences) if d.sign]
    clear = len(clear_indices), len(differences)
    for i, j in itertools.pairwise(clear_indices):
        if differences[i].sign != differences[j].sign:
            cost = _sign_change_cost(differences[i : j + 1])
            return Crossing(first, second, "shown", cost, differences[i], differences[j], clear)
    cost = _sign_change_cost(differences)
    if cost is None:
        return Crossing(first, second, "none", None, differences[0], differences[-1], clear)
    before = [d for d in differences if d.cost < cost]
    after = [d for d in differences if d.cost >= cost]
    side = math.copysign(1, before[-1].improvement.mean)
    return Crossing(
        first, second, "means only", cost,
        max(before, key=lambda d: side * d.improvement.mean), max(after, key=lambda d: -side * d.improvement.mean), clear,
    )  # fmt: skip


def _sign_change_cost(differences: Sequence[PairedDifference]) -> float | None:
    """Returns the cost at which the mean difference first changes its sign, or None."""
    for a, b in itertools.pairwise(differences):
        if a.improvement.mean * b.improvement.mean < 0:
            share = a.improvement.mean / (a.improvement.mean - b.improvement.mean)
            return a.cost * (b.cost / a.cost) ** share
    return None
