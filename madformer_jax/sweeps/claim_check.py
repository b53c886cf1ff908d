"""Checks of a protocol before the first training: against the runs of its sweep, and against an earlier protocol.

`reports.answers` looks for the two sides of a claim among the results. A claim with a side that is no run, or
with an endpoint that no run measures, would stay open after all trainings.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import aliases, fields
from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage
from madformer_jax.sweeps import budget, sweep_folder
from madformer_jax.sweeps import protocol as protocol_lib
from madformer_jax.sweeps.protocol import Claim
from madformer_jax.sweeps.sweep_file import Overrides, Sweep, apply_overrides
from madformer_jax.sweeps.sweep_folder import Job

# Sections whose values separate the tables of a report. A claim does not compare two tables.
_SEPARATED_SECTIONS = ("data.", "evaluate.")
_SEPARATED_ALONE = "codec."  # separates tables only if its values do not follow from other fields

# Score -> whether a config measures it, and what to do otherwise.
_SCORE_NEEDS: dict[str, tuple[Callable[[ConfigDict], bool], str]] = {
    "FID": (lambda c: c.evaluate.network == "inception", "set config.evaluate.network=inception, or use FD"),
    "FD": (lambda c: c.evaluate.network != "inception", "with config.evaluate.network=inception it is FID"),
    "LPIPS": (lambda c: c.evaluate.network == "alexnet", "set config.evaluate.network=alexnet"),
    "memorized": (lambda c: c.evaluate.training, "set config.evaluate.training=True"),
    "memorisation": (lambda c: c.evaluate.training, "set config.evaluate.training=True"),
    "inconsistency": (lambda c: c.data.source.startswith("patterns"), "only the source patterns defines it"),
    "seam": (lambda c: c.model.blocks > 1, "one block has no borders: use seam_difference"),
}

Settings = Mapping[str, Any]  # the fields that the sweep varies -> value


def check(sweep: Sweep, base: ConfigDict) -> None:
    """Checks the protocol of a sweep.

    Raises:
      ConfigError: A claim names a field that does not exist, one side of it is none of the runs, both are the
        same run, their scores are not comparable, no samples of it lie within its budget, or the primary
        endpoint is not measured.
    """
    if sweep.protocol is None:
        return
    protocol_lib.check(sweep.protocol)
    for overrides in sweep.evaluations:
        apply_overrides(base, overrides)  # raises an error for a field that does not exist
    endpoint = sweep.protocol.primary
    for claim in sweep.protocol.claims:
        better, worse = (_find_side(sweep, base, claim, side) for side in (claim.better, claim.worse))
        where = f"claim {claim.text!r}:"
        for side in (better, worse):
            c = apply_overrides(base, side)
            if problem := _missing_setting(endpoint, c):
                raise ConfigError(f"the primary endpoint {endpoint} is not measured: {problem}.")
            if claim.at:
                _check_budget(sweep, c, where, *claim.at)
        if better == worse:
            raise ConfigError(f"{where} both sides are the same setting, {better}: change one of them.")
        differing = {name for name in better if better[name] != worse[name]}
        separated = {name for name in differing if name.startswith((*_SEPARATED_SECTIONS, _SEPARATED_ALONE))}
        if separated == differing or any(name.startswith(_SEPARATED_SECTIONS) for name in separated):
            raise ConfigError(f"{where} its sides differ in {min(separated)}, and a report does not compare these.")
        if endpoint == "seam" and differing & {"model.blocks", "model.block_shape"}:
            raise ConfigError(f"{where} the seam score depends on the blocks: use seam_difference.")
        if targets := sorted(differing & set(protocol_lib.target_fields(endpoint))):
            raise ConfigError(
                f"{where} {endpoint} measures another target for another {targets[0]}: use bits_per_dimension."
            )


def _missing_setting(endpoint: str, c: ConfigDict) -> str:
    """Returns what a config lacks to measure an endpoint; empty if it measures it."""
    held_out = c.evaluate.held_out_n or c.evaluate.by_block
    if endpoint.startswith("bits_per_dimension"):
        if endpoint.endswith("discrete") and c.diffusion.path != "ddpm":
            return f"config.diffusion.path={c.diffusion.path!r} has no discrete timesteps: use bits_per_dimension"
        return "" if held_out else "set config.evaluate.held_out_n"
    loss = endpoint.removeprefix("held_out_")
    if loss.startswith("loss"):
        if endpoint == "held_out_loss" and not c.train.validate_every:
            return "set config.train.validate_every"
        if endpoint != loss and not (held_out or c.train.validate_every):
            return "set config.train.validate_every or config.evaluate.held_out_n"
        term = loss.removeprefix("loss_")
        return f"config.loss.{term} is 0" if term in LOSS_TERMS and not c.loss[term] else ""
    is_measured, remedy = _SCORE_NEEDS.get(endpoint, (bool, ""))
    return "" if is_measured(c) else remedy


def _check_budget(sweep: Sweep, c: ConfigDict, where: str, kind: str, amount: float) -> None:
    """Checks that an evaluation of a setting lies within the budget of a claim."""
    if kind == "seconds" and kind not in sweep.sample_budgets:
        raise ConfigError(f"{where} the sweep measures no seconds: give its sample_budgets an amount of seconds.")
    if "seconds" in sweep.sample_budgets:  # the numbers of steps follow from a measurement
        return
    costs = [
        budget.sampling_cost(c, kind, budget.solver_steps(c, budget_kind, x))
        for budget_kind, amounts in sweep.sample_budgets.items()
        for x in amounts
    ]
    if min(costs) > amount * (1 + budget.ROUNDING):
        raise ConfigError(
            f"{where} no samples of one side cost at most {amount:g} {kind}. The least of the sweep's sample_budgets is "
            f"{min(costs):.4g} {kind}: name a larger budget, or add a smaller one to sample_budgets."
        )


def _find_side(sweep: Sweep, base: ConfigDict, claim: Claim, side: Overrides) -> Settings:
    """Returns the settings of the runs that one side of a claim names."""
    overrides = {**claim.where, **side}
    values, wanted = fields.flat(base), fields.flat(apply_overrides(base, overrides))
    named = {name: wanted[name] for name in aliases.current_names(overrides, "the sweep's claims")}
    side_settings = protocol_lib.resolve_side(named, _settings(sweep, values), values)
    if side_settings is None:
        raise ConfigError(
            f"claim {claim.text!r}: no run of the sweep has the settings {overrides} and the base's values of other "
            "fields: name the settings of a run."
        )
    return side_settings


def _settings(sweep: Sweep, values: Settings) -> list[Settings]:
    """Returns the settings of all runs and evaluations. Losses belong to the first overrides of the evaluations."""
    assert sweep.protocol is not None
    evaluations = sweep.evaluations[:1] if protocol_lib.is_loss(sweep.protocol.primary) else sweep.evaluations
    overrides = [fields.flat({**run, **sampled}) for run in sweep.runs for sampled in evaluations]
    names = dict.fromkeys(name for x in overrides for name in x if name != "seed")
    return [{name: x.get(name, values[name]) for name in names} for x in overrides]


def check_unchanged(job: Job) -> None:
    """Checks that a protocol written before the results has not changed since the first result of the folder.

    Raises:
      ConfigError: It has changed, or the folder had none.
    """
    path = os.path.join(job.workdir, "sweep.json")
    stored, plan = storage.read_json_object(path) or {}, json.loads(json.dumps(sweep_folder.plan_json(job)))
    new = plan["protocol"]
    if any(stored.get(name) != plan[name] for name in ("sweep", "variant")) or not new:
        return
    if new["written"] == protocol_lib.AFTER or _decisive_parts(stored.get("protocol")) == _decisive_parts(new):
        return
    finished = [run for run in stored["runs"] if sweep_folder.has_result(job.workdir, run["name"])]
    if finished:
        raise ConfigError(
            f"the sweep's protocol differs from that of {path}, and {len(finished)} runs have results: restore it, use "
            "another --workdir, or give it written=protocol.AFTER, which marks its answers as exploratory."
        )


def _decisive_parts(stored: Mapping[str, Any] | None) -> Any:
    """Returns what decides the answers to a protocol of sweep.json: all but the texts."""
    if stored is None:
        return None

    def side(overrides: Mapping[str, Any]) -> Settings:
        return aliases.current_names(fields.flat(overrides), "sweep.json")

    claims = [(*(side(x.get(name, {})) for name in ("better", "worse", "where")), x["at"]) for x in stored["claims"]]
    return claims, *(stored[name] for name in ("primary", "secondary", "written")), stored.get("margin", 0.0)
