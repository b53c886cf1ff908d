"""All scores of a set of images with their intervals, and tables of several results.

`sample_scores` calls `compute_scores`, and `modes.evaluate` prints `comparison_table`.

To add a score, write it in `scores`, its replicates in `bootstrap`, and an entry in
`compute_scores`. A setting that changes its value belongs in `SCORE_SETTINGS`, which is part of
every protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import bootstrap, scores, seams
from madformer_jax.evaluation.memorization import TrainingFeatures, memorization_ratio
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.evaluation.reference_statistics import Reference

SPLITS, SUBSETS, SUBSET_SIZE, NEIGHBOR_RANK, SEED = 10, 100, 1000, 3, 2020
SCORE_SETTINGS = {
    "like": "torch-fidelity 0.4.0", "splits": SPLITS, "subsets": SUBSETS, "subset_size": SUBSET_SIZE,
    "k": NEIGHBOR_RANK, "seed": SEED,
}  # fmt: skip

Score = dict[str, float]  # value, low, high, and further entries such as deviation


def check_size(n: int, reference: Reference) -> None:
    """Checks that there are enough images for the scores; see `check_counts`."""
    check_counts(n, SPLITS if reference.features is None else len(reference.features))


def check_counts(n: int, m: int) -> None:
    """Checks that there are enough images for the scores, before images are sampled.

    Args:
      n: Number of images to score.
      m: Number of images of the reference.

    Raises:
      ConfigError: There are too few images for the inception score or too few for precision and
        recall.
    """
    if n < SPLITS:
        raise ConfigError(
            f"config.evaluate.n={n} images are too few for a covariance and {SPLITS} splits: set {SPLITS} or more."
        )
    if m <= NEIGHBOR_RANK:
        raise ConfigError(f"a reference of {m} images is too small: it needs more than {NEIGHBOR_RANK}.")


def compute_scores(
    network: Network | type[Network],
    arrays: Mapping[str, np.ndarray],
    reference: Reference,
    *,
    recognize: bool,
    grid: tuple[int, int],
    shape: tuple[int, int],
    training: TrainingFeatures | None = None,
) -> dict[str, Score]:
    """Computes all scores of a set of images.

    Args:
      network: The feature network, which names its scores.
      arrays: Arrays of `shards.extract_features`: features (n, d), logits (n, classes) if the
        network has classes, labels (n,) and profile (n, .).
      reference: Statistics of the real images.
      recognize: Whether to compute the fraction of images that the network classifies as their
        label.
      grid: Rows and columns of blocks.
      shape: Height and width of an image.
      training: The training images, for the memorization score.

    Returns:
      The scores by name. `Network.score_name` names those that depend on the features.

    Raises:
      ConfigError: Features are not finite.
    """
    x, y = arrays["features"], reference.features
    counts = bootstrap.resample_counts(len(x))
    names = [network.score_name(name) for name in ("FID", "KID", "IS", "precision", "recall")]
    out = {
        names[0]: _with_interval(
            scores.frechet(x, reference.frechet_input),
            bootstrap.frechet_replicates(x, reference.frechet_input, counts),
        )
    }
    if y is not None:
        mean, deviation = scores.kernel_distance(x, y, SUBSETS, SUBSET_SIZE, SEED)
        out[names[1]] = _with_interval(mean, bootstrap.kernel_replicates(x, y, counts), deviation)
    if "logits" in arrays:
        mean, deviation = scores.inception_score(arrays["logits"], SPLITS, SEED)
        out[names[2]] = _with_interval(
            mean, bootstrap.inception_replicates(arrays["logits"], counts, SPLITS, SEED), deviation
        )
    if y is not None:
        for name, inside in zip(names[3:], scores.inside_balls(x, y, NEIGHBOR_RANK)):
            out[name] = _mean_score(inside)
    # Results store the names "recognised" and "memorisation", so both keep their spelling.
    if recognize:
        out["recognised"] = _mean_score(arrays["logits"].argmax(axis=1) == arrays["labels"])
    if sum(grid) > 2:
        steps = seams.border_and_interior_steps(arrays["profile"], shape, *grid)
        out["seam"] = _with_interval(
            seams.seam_score(steps), bootstrap.ratio_replicates(steps[:, 0], steps[:, 1], counts)
        )
        if reference.profile is not None:
            real = seams.seam_score(seams.border_and_interior_steps(reference.profile[None], shape, *grid))
            out["seam"]["real"] = real
    if training is not None:
        distances, held_out = training.distances(x), training.held_out_distances
        out["memorisation"] = {
            **_with_interval(
                memorization_ratio(distances, held_out),
                bootstrap.mean_replicates(distances, counts) / held_out.mean(),
            ),
            "searched": training.searched,
            "training": training.images,
        }
    return out


def _with_interval(value: float, replicates: np.ndarray, deviation: float | None = None) -> Score:
    score = {"value": value, **bootstrap.interval(value, replicates)._asdict()}
    return score if deviation is None else {**score, "deviation": deviation}


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray) -> Score:
    """Returns the ratio of two sums over images, with an interval.

    Args:
      numerator: One value per image (n,).
      denominator: One value per image (n,).
    """
    value = float(scores.ratio(numerator.sum(), denominator.sum()))
    counts = bootstrap.resample_counts(len(numerator))
    return _with_interval(value, bootstrap.ratio_replicates(numerator, denominator, counts))


def mean_score(values: np.ndarray) -> Score:
    """Returns the mean of one value per image (n,), with an interval, the standard error and n."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {**ratio_of_sums(values, np.ones(len(values))), "standard_error": error, "n": len(values)}


def _mean_score(values: np.ndarray) -> Score:
    """Returns the mean of one value from 0 to 1 per image (n,), with an interval inside [0, 1]."""
    score = _with_interval(
        float(np.mean(values)), bootstrap.mean_replicates(values, bootstrap.resample_counts(len(values)))
    )
    return {name: min(max(x, 0.0), 1.0) for name, x in score.items()}


_MAX_CELL_WIDTH = 40  # characters; longer values, for example prompts, are cut


def comparison_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of results of --mode=evaluate, one row each.

    The columns are the settings in which the images differ, the scores, and the costs.

    Raises:
      ConfigError: The protocols differ in more than the images, so the scores are not comparable.
    """
    first = results[0]["protocol"]
    for result in results[1:]:
        for field in ("reference", "network", "image", "scores", "n"):
            value, first_value = result["protocol"][field], first[field]
            if value != first_value:
                raise ConfigError(
                    f"scores of different protocols do not share a table: {field} {value!r} against {first_value!r}."
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
    """Averages the scores of each setting over its checkpoints.

    Returns:
      A result for each setting with several checkpoints. The interval of a score is its range over
      checkpoints.
    """
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
    """Flattens nested mappings. Keys are joined by dots."""
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
