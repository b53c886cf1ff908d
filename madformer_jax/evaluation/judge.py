"""All scores of a set of images against a reference, each with its interval, and the table of several sets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import bootstrap, scores, seams
from madformer_jax.evaluation.memorization import TrainingFeatures, memorization_ratio
from madformer_jax.evaluation.reference_statistics import Reference

SPLITS, SUBSETS, SUBSET_SIZE, NEIGHBOR_RANK, SEED = 10, 100, 1000, 3, 2020
SCORE_SETTINGS = {
    "like": "torch-fidelity 0.4.0", "splits": SPLITS, "subsets": SUBSETS, "subset_size": SUBSET_SIZE, "k": NEIGHBOR_RANK, "seed": SEED,
}  # fmt: skip

Score = dict[str, float]  # value, low, high; deviation where the convention has one


def check_size(n: int, reference: Reference) -> None:
    """See `check_counts`."""
    check_counts(n, SPLITS if reference.features is None else len(reference.features))


def check_counts(n: int, m: int) -> None:
    """Refuses, before anything is drawn, fewer images than the scores need.

    Args:
      n: Images that are judged.
      m: Images of the reference.

    Raises:
      ConfigError: less than ten images, which have no inception score, or a reference of less than the balls need.
    """
    if n < SPLITS:
        raise ConfigError(
            f"config.evaluate.n={n} images are too few for a covariance and {SPLITS} splits: {SPLITS} or more."
        )
    if m <= NEIGHBOR_RANK:
        raise ConfigError(f"a reference of {m} images is too small: it needs more than {NEIGHBOR_RANK}.")


def compute_scores(
    network: str,
    found: Mapping[str, np.ndarray],
    reference: Reference,
    *,
    recognise: bool,
    grid: tuple[int, int],
    shape: tuple[int, int],
    training: TrainingFeatures | None = None,
) -> dict[str, Score]:
    """The scores by name; those of another network than FID's carry its name.

    Args:
      network: its name.
      found: what `parts.look` found: features (n, d), logits (n, classes) if any, labels (n,), profile (n, .).
      reference: what to compare with.
      recognise: whether the labels are those asked for and the network's classes the same.
      grid, shape: rows and columns of blocks, height and width of an image.
      training: the training images, to look for copies of them.

    Raises:
      ConfigError: features are not finite.
    """
    x, y = found["features"], reference.features
    drawn = bootstrap.resample_counts(len(x))
    names = ["FID", "KID", "IS", "precision", "recall"]
    if network != "inception":
        names = [f"{name}-{network}" for name in ("FD", *names[1:])]
    out = {
        names[0]: _with_interval(scores.frechet(x, reference.of), bootstrap.frechet_replicates(x, reference.of, drawn))
    }
    if y is not None:
        mean, deviation = scores.kernel_distance(x, y, SUBSETS, SUBSET_SIZE, SEED)
        out[names[1]] = _with_interval(mean, bootstrap.kernel_replicates(x, y, drawn), deviation)
    if "logits" in found:
        mean, deviation = scores.inception_score(found["logits"], SPLITS, SEED)
        out[names[2]] = _with_interval(
            mean, bootstrap.inception_replicates(found["logits"], drawn, SPLITS, SEED), deviation
        )
    if y is not None:
        for name, inside in zip(names[3:], scores.inside_balls(x, y, NEIGHBOR_RANK)):
            out[name] = _mean_score(inside)
    if recognise:
        out["recognised"] = _mean_score(found["logits"].argmax(axis=1) == found["labels"])
    if sum(grid) > 2:
        steps = seams.border_and_interior_steps(found["profile"], shape, *grid)
        out["seam"] = _with_interval(
            seams.seam_score(steps), bootstrap.ratio_replicates(steps[:, 0], steps[:, 1], drawn)
        )
        if reference.profile is not None:
            real = seams.seam_score(seams.border_and_interior_steps(reference.profile[None], shape, *grid))
            out["seam"]["real"] = real
    if training is not None:
        near, typical = training.nearest(x), training.typical
        out["memorisation"] = {
            **_with_interval(
                memorization_ratio(near, typical), bootstrap.mean_replicates(near, drawn) / typical.mean()
            ),
            "searched": training.searched,
            "training": training.images,
        }
    return out


def _with_interval(value: float, replicates: np.ndarray, deviation: float | None = None) -> Score:
    score = {"value": value, **bootstrap.interval(value, replicates)._asdict()}
    return score if deviation is None else {**score, "deviation": deviation}


def ratio_of_sums(above: np.ndarray, below: np.ndarray) -> Score:
    """The sum of one value an image (n,) over that of another."""
    value = float(scores.ratio(above.sum(), below.sum()))
    return _with_interval(value, bootstrap.ratio_replicates(above, below, bootstrap.resample_counts(len(above))))


def _mean_score(values: np.ndarray) -> Score:
    score = _with_interval(
        float(np.mean(values)), bootstrap.mean_replicates(values, bootstrap.resample_counts(len(values)))
    )
    return {name: min(max(x, 0.0), 1.0) for name, x in score.items()}


# ---- tables

_MAX_CELL_WIDTH = 40  # characters of a cell; a list of prompts would be pages


def comparison_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Several results of --mode=evaluate side by side, in Markdown, with what their images differ in.

    Raises:
      ConfigError: their protocols differ in more than the images, so that their scores are not comparable.
    """
    first = results[0]["protocol"]
    for result in results[1:]:
        for part in ("reference", "network", "image", "scores", "n"):
            ours, other = result["protocol"][part], first[part]
            if ours != other:
                raise ConfigError(
                    f"scores of different protocols do not share a table: {part} {ours!r} against {other!r}."
                )
    settings = [flatten_keys(result["protocol"]["images"]) for result in results]
    fields = [name for name in dict.fromkeys(name for s in settings for name in s) if _has_differences(settings, name)]
    costs = [
        name
        for name in ("solver_steps", "nfe", "passes", "seconds")
        if any(r.get("cost", {}).get(name) for r in results)
    ]
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    lines = [[*(fields or ["images"]), *names, *costs]]
    for result, setting in zip(results, settings):
        row = [_format_value(setting.get(name)) for name in fields] or ["all"]
        row += [_format_score(result["scores"].get(name)) for name in names]
        lines.append(row + [_format_value(result.get("cost", {}).get(name)) for name in costs])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_over_checkpoints(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each setting with results of several checkpoints the mean of each score, from the lowest to the highest of them."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        images = {name: x for name, x in result["protocol"]["images"].items() if name not in ("step", "fingerprint")}
        groups.setdefault(repr(sorted(images.items())), []).append(result)
    out = []
    for group in groups.values():
        if len(group) == 1:
            continue
        first = group[0]
        images = {**first["protocol"]["images"], "step": f"mean of {len(group)}"}
        values = {name: [result["scores"][name]["value"] for result in group] for name in first["scores"]}
        spread = {name: {"value": float(np.mean(x)), "low": min(x), "high": max(x)} for name, x in values.items()}
        out.append({**first, "protocol": {**first["protocol"], "images": images}, "scores": spread})
    return out


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys joined by dots."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= flatten_keys(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _has_differences(settings: Sequence[Mapping[str, Any]], name: str) -> bool:
    return "fingerprint" not in name and name != "prompts" and len({repr(s.get(name)) for s in settings}) > 1


def _format_value(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_CELL_WIDTH else f"{text[: _MAX_CELL_WIDTH - 3]}..."


def _format_score(score: Score | None) -> str:
    return "" if score is None else f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}]"
