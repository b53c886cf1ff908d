"""The protocol of a sweep: what is asked, how it is measured, and what would refute it.

A sweep file states the protocol before the sweep runs. `--dry_run` prints it, sweep.json keeps it, and
the report answers its claims (`reports.answers`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.errors import ConfigError
from madformer_jax.sweeps import budget

BEFORE, AFTER = "before the results", "after the results"
LOSSES = ("loss", *(f"loss_{name}" for name in (*LOSS_TERMS, "q1", "q2", "q3", "q4")))
ENDPOINTS_WITHOUT_SAMPLES = (
    "bits_per_dimension", "bits_per_dimension_discrete", *LOSSES, *(f"held_out_{name}" for name in LOSSES),
)  # fmt: skip
SCORES = (  # first words of the scores of samples
    "FD", "FID", "KID", "IS", "precision", "recall", "recognised", "LPIPS", "seam", "seam_difference", "inconsistency",
    "memorisation", "memorized", "attributes",
)  # fmt: skip
# Fields that change what a loss measures. Settings that differ in one of them have no common loss.
_TARGET_FIELDS = (
    "model.blocks", "model.prediction_type", "loss.weighting", "diffusion.path", "diffusion.time_sampling",
    "diffusion.shift", "codec.patch", "train.context_noise",
)  # fmt: skip
# These change the loss of training only: held-out losses have true blocks, the D of the model and all labels.
_TRAINING_TARGET_FIELDS = (
    "train.own_context", "train.own_context_timestep", "train.own_context_steps", "train.elastic_depth",
    "train.elastic_depths", "train.label_dropout",
)  # fmt: skip


class Claim(NamedTuple):
    """A statement that one setting is better than another in the primary endpoint.

    Attributes:
      text: The statement, in one sentence.
      better: Overrides of the setting that is claimed to be better; {} is the sweep's base.
      worse: The same for the other setting.
      at: Kind and amount of a sampling budget (`budget.SAMPLE_BUDGET_KINDS`). Each setting counts with
        its best step count within the budget. None for a loss, which needs no samples.
      where: Fields that choose one of several tables, such as {"data.image_size": 64}.
    """

    text: str
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    at: tuple[str, float] | None = None
    where: Mapping[str, Any] = {}


class Protocol(NamedTuple):
    """The endpoints and claims of a sweep.

    Attributes:
      primary: The endpoint of the claims: the first word of a score ("KID"), a loss ("loss_image",
        "held_out_loss_image", "held_out_loss_q1") or "bits_per_dimension". Losses with "held_out_" need
        `train.validate_every` or `evaluate.held_out_n`, bits per dimension need the latter.
      secondary: The endpoint that is reported beside it.
      claims: The statements. Their intervals hold together, so that each further claim widens all.
      refuted_if: What would refute the claims, in words.
      margin: Smallest improvement that counts, as a share of the mean of the worse setting. A claim is
        refuted if its interval lies below the margin.
      written: When the protocol was written, `BEFORE` or `AFTER`.
    """

    primary: str
    secondary: str
    claims: Sequence[Claim]
    refuted_if: str
    margin: float = 0.0
    written: str = BEFORE

    def describe(self) -> dict[str, Any]:
        """Returns the protocol for sweep.json."""
        return self._asdict() | {"claims": [claim._asdict() for claim in self.claims]}


def is_loss(endpoint: str) -> bool:
    """Returns whether an endpoint is a loss or a bound on the likelihood, which need no samples."""
    return endpoint in ENDPOINTS_WITHOUT_SAMPLES


def resolve_side(
    named: Mapping[str, Any], settings: Iterable[Mapping[str, Any]], base: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Returns the setting of a sweep that one side of a claim names; None if there is none.

    A field that the side leaves out has the value that follows from the named ones, else that of the base.

    Args:
      named: The overrides of the side and of `Claim.where`.
      settings: The overrides of all runs and evaluations, each with the same fields.
      base: Values of the base config.
    """
    agreeing = [s for s in settings if all(s.get(name, base.get(name)) == value for name, value in named.items())]
    matches = agreeing
    for name in matches[0] if matches else ():
        if any(s[name] != matches[0][name] for s in matches):
            matches = [s for s in matches if s[name] == base.get(name)]
    # A value other than the base's must follow from the named fields: no setting has them with the base's value.
    for name, value in (matches[0] if matches else {}).items():
        if name not in named and value != base.get(name) and any(s[name] == base.get(name) for s in agreeing):
            return None
    return matches[0] if matches else None


def target_fields(endpoint: str) -> tuple[str, ...]:
    """Returns the fields that change what a loss measures; none for other endpoints, such as bits per dimension."""
    if "loss" not in endpoint:
        return ()
    return _TARGET_FIELDS if endpoint.startswith("held_out_") else _TARGET_FIELDS + _TRAINING_TARGET_FIELDS


def facts(protocol: Mapping[str, Any], question: str, seeds: int) -> list[tuple[str, str]]:
    """Returns the name and the text of each part of a protocol, as stored in sweep.json."""
    share = protocol.get("margin", 0.0)
    margin = f"; an improvement below {100 * share:g} % does not count" if share else ""
    return [
        ("question", question),
        ("primary endpoint", protocol["primary"] + margin),
        ("secondary endpoint", protocol["secondary"]),
        *((f"claim {i}", _claim_text(claim)) for i, claim in enumerate(protocol["claims"], 1)),
        ("refuted if", protocol["refuted_if"]),
        ("seeds", str(seeds)),
        ("written", protocol["written"]),
    ]


def _claim_text(claim: Mapping[str, Any]) -> str:
    conditions = [f"{name} = {value}" for name, value in claim["where"].items()]
    if claim["at"]:
        kind, amount = claim["at"]
        unit = {"nfe": "NFE", "flops": "FLOPs"}.get(kind, kind)
        conditions.append(f"best step count within {amount:g} {unit}")
    return f"{claim['text']} ({claim_sides(claim)}{''.join(f'; {condition}' for condition in conditions)})"


def claim_sides(claim: Mapping[str, Any]) -> str:
    """Returns "A against B", the settings in which the two sides of a claim differ."""
    better, worse = claim["better"], claim["worse"]
    same = {name for name in better if better[name] == worse.get(name, object())}
    sides = [
        ", ".join(f"{name} = {value}" for name, value in side.items() if name not in same) or "base"
        for side in (better, worse)
    ]
    return " against ".join(sides)


def check(protocol: Protocol) -> None:
    """Checks a protocol.

    Raises:
      ConfigError: It has no claims, its primary endpoint does not exist, or a claim has an unknown kind of
        budget or none where one is needed.
    """
    if not protocol.claims:
        raise ConfigError("the sweep's protocol has no claims: state one, or leave the protocol out.")
    if protocol.primary not in (*ENDPOINTS_WITHOUT_SAMPLES, *SCORES):
        raise ConfigError(
            f"the primary endpoint {protocol.primary!r} is unknown: use one of "
            f"{', '.join((*ENDPOINTS_WITHOUT_SAMPLES, *SCORES))}."
        )
    for claim in protocol.claims:
        if claim.at is not None and (len(claim.at) != 2 or not budget.is_amount(claim.at[1])):
            raise ConfigError(f"claim {claim.text!r}: at={claim.at!r} must be a kind and a number, as in ('nfe', 4).")
        if (claim.at is None) != is_loss(protocol.primary):
            need = "no budget: remove `at`" if is_loss(protocol.primary) else "a sampling budget: set `at`"
            raise ConfigError(f"claim {claim.text!r}: the endpoint {protocol.primary} needs {need}.")
        if claim.at and claim.at[0] not in budget.SAMPLE_BUDGET_KINDS:
            kinds = ", ".join(budget.SAMPLE_BUDGET_KINDS)
            raise ConfigError(f"claim {claim.text!r}: {claim.at[0]!r} is not a kind of budget: use one of {kinds}.")
