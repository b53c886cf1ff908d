"""The answer to a sweep's protocol: each claim is shown, refuted or open.

The intervals of all claims hold together (Bonferroni): with probability 95 % none misses its true
difference. Unlike Holm's, they also bound how small a difference is, which a refutation needs.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from madformer_jax.config import aliases, fields
from madformer_jax.reports import comparisons
from madformer_jax.reports.comparisons import Setting
from madformer_jax.reports.formatting import format_interval, format_number
from madformer_jax.reports.intervals import ALPHA, Estimate, estimate
from madformer_jax.reports.results import Budget, ProtocolGroup, Results, score_sign
from madformer_jax.sweeps.protocol import claim_sides, resolve_side


class Answer(NamedTuple):
    """The answer to one claim. Without results, it has only the first three fields."""

    claim: Mapping[str, Any]  # as in sweep.json
    verdict: str  # "shown", "refuted" or "open"
    endpoint: str  # name of the score or loss
    improvement: Estimate | None = None  # of the claimed setting over the other, with a simultaneous interval
    worse_mean: float = 0.0  # of the other setting
    steps: tuple[int, int] | None = None  # solver steps of both settings; None for a loss
    margin: float = 0.0  # smallest improvement that counts, in units of the endpoint
    seeds: tuple[int, int] = (0, 0)  # numbers of seeds that both settings have a score for, and that either has

    @property
    def sentence(self) -> str:
        """The verdict, the claim and its evidence."""
        head = f"{self.verdict.capitalize()}: {self.claim['text']}."
        if self.improvement is None:
            return f"{head} There are no results for it."
        x = self.improvement
        interval = format_interval(x) or "(no interval: one seed)"
        share = x.mean / abs(self.worse_mean) if self.worse_mean else 0.0
        percent = f", {100 * share:.0f} % of the other setting's mean" if abs(share) >= 0.005 else ""
        steps = f", at {' against '.join(map(str, dict.fromkeys(self.steps)))} solver steps" if self.steps else ""
        note = ""
        if self.verdict == "shown" and x.mean < self.margin:
            note = " This is below the smallest improvement that counts."
        elif self.verdict == "refuted" and x.high is not None and x.high >= 0:
            note = " The interval lies below the smallest improvement that counts."
        counted, all_seeds = self.seeds
        if counted < all_seeds:
            note += f" Only {counted} of {all_seeds} seeds count: the others have no finite score of both settings."
        return f"{head} Improvement of {self.endpoint}: {format_number(x.mean)} {interval}{percent}{steps}.{note}"


def answers(results: Results) -> list[Answer]:
    """Returns the answers to the claims of a sweep's protocol; empty without a protocol.

    The texts of claims that differ in their settings alone get these settings.
    """
    protocol = results.protocol
    if not protocol:
        return []
    texts = Counter(claim["text"] for claim in protocol["claims"])
    claims = [
        {**claim, "text": f"{claim['text']} ({claim_sides(claim)})"} if texts[claim["text"]] > 1 else claim
        for claim in protocol["claims"]
    ]
    return [_answer(results, protocol, claim) for claim in claims]


def endpoint_label(name: str) -> str:
    """Returns the name of an endpoint in text."""
    losses = {"loss_image": "training image loss", "held_out_loss_image": "held-out image loss"}
    return {**losses, "bits_per_dimension": "bits per dimension"}.get(name, name)


def endpoint_scores(group: ProtocolGroup, protocol: Mapping[str, Any] | None) -> list[str]:
    """Returns the names of the endpoints among a group's scores; without a protocol, of the first two scores."""
    if protocol is None:
        return group.scores[:2]
    words = (protocol["primary"], protocol["secondary"])
    names = [name for word in words for name in group.scores if name.partition("-")[0] == word]
    return names + [name for name in group.scores[:2] if name not in names]


def _answer(results: Results, protocol: Mapping[str, Any], claim: Mapping[str, Any]) -> Answer:
    endpoint, alpha = protocol["primary"], ALPHA / len(protocol["claims"])
    for group in results.groups:
        settings = [_find_setting(results, group, claim, side) for side in ("better", "worse")]
        if None in settings:
            continue
        sides = _endpoint_values(results, group, endpoint, claim["at"], [s for s in settings if s is not None])
        if sides is None:
            continue
        name, better, worse, steps = sides
        values = [score_sign(name) * x for x in comparisons.paired(better, worse)]
        if not values:
            continue
        improvement, mean = estimate(values, alpha), statistics.fmean(x for seed, x in worse.items() if seed in better)
        margin = protocol.get("margin", 0.0) * abs(mean)
        verdict = _verdict(improvement, margin)
        seeds = len(values), len({point.seed for point in group.points if point.setting in settings})
        return Answer(claim, verdict, endpoint_label(name), improvement, mean, steps, margin, seeds)
    return Answer(claim, "open", endpoint)


def _verdict(improvement: Estimate, margin: float) -> str:
    if improvement.low is None or improvement.high is None:
        return "open"
    return "shown" if improvement.low > 0 else "refuted" if improvement.high < margin else "open"


def _find_setting(results: Results, group: ProtocolGroup, claim: Mapping[str, Any], side: str) -> Setting | None:
    """Returns the setting of a group that a side of a claim names, or None."""
    named = aliases.current_names(fields.flat({**claim["where"], **claim[side]}), "sweep.json")
    evaluations = results.runs[0]["evaluations"][: 1 if claim["at"] is None else None]  # losses: of the first
    runs = [run["overrides"] for run in results.runs]
    runs += [aliases.current_names(fields.flat(run["overrides"]), "sweep.json") for run in results.missing]
    rows = [{**run, **evaluation["overrides"]} for run in runs for evaluation in evaluations]
    names = dict.fromkeys(name for row in rows for name in row if name != "seed")
    known = {**names, **named}
    base = {name: run["config"].get(name) for run in results.runs for name in known if name not in run["overrides"]}
    base |= results.base
    row = resolve_side(named, [{name: row.get(name, base.get(name)) for name in names} for row in rows], base)
    if row is None or any(row.get(name, value) != value for name, value in group.key.items()):
        return None
    setting = tuple(row[axis.field] for axis in group.axes)
    return setting if setting in group.settings else None


Values = Mapping[int, float]  # seed -> score


def _endpoint_values(
    results: Results, group: ProtocolGroup, endpoint: str, at: Iterable[Any] | None, pair: list[Setting]
) -> tuple[str, Values, Values, tuple[int, int] | None] | None:
    """Returns the endpoint's name, its values for both settings, and their solver steps; None without values."""
    if at is None:
        values = comparisons.losses(results, group, endpoint)
        return (endpoint, values[pair[0]], values[pair[1]], None) if all(s in values for s in pair) else None
    name = next((name for name in group.scores if name.partition("-")[0] == endpoint), None)
    if name is None:
        return None
    a, b = (comparisons.best_within(group, s, name, Budget(*at)) for s in pair)
    return (name, a.values, b.values, (a.steps, b.steps)) if a and b else None
