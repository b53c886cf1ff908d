"""Whether two curves of score against cost change order, with intervals: the paper's finding 2 for each pair of settings."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.reports.results import Estimate, ProtocolGroup, estimate, score_sign

SeedCurves = Mapping[int, Sequence[tuple[float, float]]]  # seed -> (cost, score), by cost


class PairedDifference(NamedTuple):
    """By how much the first of two settings is better at a cost, over the seeds that both have."""

    cost: float
    by: Estimate

    @property
    def sign(self) -> int:
        """Which one is better: 1 the first, -1 the second, 0 where the interval holds 0 or there is none."""
        low, high = self.by.low, self.by.high
        return 0 if low is None or high is None else (low > 0) - (high < 0)


class Crossing(NamedTuple):
    """What becomes of the order of two settings as the cost grows."""

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    verdict: (
        str  # "shown": clear on both sides; "means only": not clear on one of them; "none": the order never changes
    )
    at: float | None  # cost at which the mean difference is 0
    before: PairedDifference  # clear if shown; else the largest on this side
    after: PairedDifference
    clear: tuple[int, int]  # costs at which an interval excludes 0, and all of them


def seed_curves(part: ProtocolGroup, setting: tuple[Any, ...], score: str, cost: str) -> SeedCurves:
    """The points of a setting for each seed; none where the cost was not measured."""
    found: dict[int, dict[float, float]] = {}
    for point in part.at(setting):
        if cost in point.cost and score in point.scores:
            found.setdefault(point.seed, {})[point.cost[cost]] = point.scores[score].value
    return {seed: sorted(values.items()) for seed, values in found.items()}


def paired_differences(first: SeedCurves, second: SeedCurves, sign: int) -> list[PairedDifference]:
    """How much better the first curve is, seed by seed, at every cost at which either has a point and both have a value.

    Between two points of a curve the score is linear in the logarithm of the cost. sign: 1 where more is better, else -1.
    """
    costs = sorted({x for c in (first, second) for points in c.values() for x, _ in points})
    out = []
    for cost in costs:
        pairs = [
            (interpolate(first[s], cost), interpolate(second[s], cost)) for s in sorted(first.keys() & second.keys())
        ]
        by = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
        if by:
            out.append(PairedDifference(cost, estimate(by)))
    return out


def interpolate(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """A curve's score at a cost; None outside of it."""
    if not points[0][0] <= cost <= points[-1][0]:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= cost < x1:
            share = math.log(cost / x0) / math.log(x1 / x0)
            return y0 + share * (y1 - y0)
    return points[-1][1]


def find_crossings(part: ProtocolGroup, score: str, cost: str) -> list[Crossing]:
    """Every two settings that differ in one axis and are compared at two costs or more."""
    out = []
    for a, b in itertools.combinations(part.settings, 2):
        if sum(x != y for x, y in zip(a, b)) == 1:
            found = paired_differences(
                seed_curves(part, a, score, cost), seed_curves(part, b, score, cost), score_sign(score)
            )
            if len(found) > 1:
                out.append(_classify_crossing(a, b, found))
    return out


def _classify_crossing(first: tuple[Any, ...], second: tuple[Any, ...], found: Sequence[PairedDifference]) -> Crossing:
    sure = [i for i, d in enumerate(found) if d.sign]
    clear = len(sure), len(found)
    for i, j in itertools.pairwise(sure):
        if found[i].sign != found[j].sign:
            at = _sign_change_cost(found[i : j + 1])
            return Crossing(first, second, "shown", at, found[i], found[j], clear)
    at = _sign_change_cost(found)
    if at is None:
        return Crossing(first, second, "none", None, found[0], found[-1], clear)
    before = [d for d in found if d.cost < at]
    after = [d for d in found if d.cost >= at]
    side = math.copysign(1, before[-1].by.mean)
    return Crossing(
        first, second, "means only", at,
        max(before, key=lambda d: side * d.by.mean), max(after, key=lambda d: -side * d.by.mean), clear,
    )  # fmt: skip


def _sign_change_cost(found: Sequence[PairedDifference]) -> float | None:
    """The cost at which the mean difference first changes its sign."""
    for a, b in itertools.pairwise(found):
        if a.by.mean * b.by.mean < 0:
            share = a.by.mean / (a.by.mean - b.by.mean)
            return a.cost * (b.cost / a.cost) ** share
    return None
