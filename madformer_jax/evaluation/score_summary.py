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
from madformer_jax.evaluation import bootstrap, diversity, scores, seams
from madformer_jax.evaluation.memorization import TrainingFeatures, memorization_ratio
from madformer_jax.evaluation.networks.network import Network
from madformer_jax.evaluation.reference_statistics import Reference

SPLITS, SUBSETS, SUBSET_SIZE, NEIGHBOR_RANK, SEED = 10, 100, 1000, 3, 2020
SCORE_SETTINGS = {
    "like": "torch-fidelity 0.4.0", "splits": SPLITS, "subsets": SUBSETS, "subset_size": SUBSET_SIZE,
    "k": NEIGHBOR_RANK, "seed": SEED,
}  # fmt: skip

Score = dict[str, Any]  # value, low, high, and further entries such as deviation
PAIRS = 8  # samples nearest to training images whose pairs are listed
MEMORIZED_PERCENTILE = 5.0  # a sample nearer to a training image than this share of held-out images is memorized


def check_counts(n: int, m: int) -> None:
    """Checks that n images to score and m of the reference are enough, before images are sampled.

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
    seam_lines: int,
    training: TrainingFeatures | None = None,
) -> dict[str, Score]:
    """Computes all scores of a set of images.

    Args:
      network: The feature network, which names its scores.
      arrays: Arrays of `shards.extract_features`: features (n, d), logits (n, classes) if the
        network has classes, labels (n,), profile (n, .), embedding (n, e) if the network has one, and
        inconsistency (n,) if the data source defines it.
      reference: Statistics of the real images.
      recognize: Whether to compute the fraction of images that the network classifies as their
        label.
      grid: Rows and columns of blocks.
      shape: Height and width of an image.
      seam_lines: Distance of the lines of `seam_difference`.
      training: The training images, for the memorization scores.

    Returns:
      The scores by name. `Network.score_name` names those that depend on the features.

    Raises:
      ConfigError: Features are not finite, or there are too few images.
    """
    y = reference.features
    x = scores.validate_features(arrays["features"], "generated", minimum=2, purpose="a covariance")
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
        real_counts = bootstrap.resample_counts(len(y), seed=SEED + 1)
        replicates = scores.weighted_kernel_distances(x, y, counts, real_counts)
        out[names[1]] = _with_interval(mean, replicates, deviation)
    if "logits" in arrays:
        mean, deviation = scores.inception_score(arrays["logits"], SPLITS, SEED)
        out[names[2]] = _with_interval(
            mean, bootstrap.inception_replicates(arrays["logits"], counts, SPLITS, SEED), deviation
        )
    if y is not None:
        for name, inside in zip(names[3:], scores.inside_balls(x, y, NEIGHBOR_RANK)):
            out[name] = share(inside)
    # Results store the names "recognised" and "memorisation", so both keep their spelling.
    if recognize:
        out["recognised"] = share(arrays["logits"].argmax(axis=1) == arrays["labels"])
    if "embedding" in arrays:
        out |= _diversity_score(arrays["embedding"], arrays["labels"], counts)
    if "inconsistency" in arrays:
        out["inconsistency"] = mean_score(arrays["inconsistency"])
    out |= _seam_scores(arrays["profile"], reference.profile, counts, grid, shape, seam_lines)
    if training is not None:
        out |= memorization_scores(training, x)
    return out


def _diversity_score(embedding: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> dict[str, Score]:
    (value,) = diversity.mean_distances(embedding, labels, np.ones((1, len(labels))))
    if np.isnan(value):  # no class has two images
        return {}
    replicates = diversity.mean_distances(embedding, labels, counts)
    return {"LPIPS-diversity": _with_interval(float(value), replicates[np.isfinite(replicates)])}


def _seam_scores(
    profiles: np.ndarray,
    real_profile: np.ndarray | None,
    counts: np.ndarray,
    grid: tuple[int, int],
    shape: tuple[int, int],
    seam_lines: int,
) -> dict[str, Score]:
    """Computes the score of the model's block borders, and the difference to real images on common lines."""
    out = {}
    if sum(grid) > 2 and grid != shape:  # blocks of one pixel have no inside
        steps = seams.border_and_interior_differences(profiles, shape, *grid)
        out["seam"] = _with_interval(
            seams.seam_score(steps), bootstrap.ratio_replicates(steps[:, 0], steps[:, 1], counts)
        )
        if real_profile is not None:
            out["seam"]["real"] = seams.seam_score(
                seams.border_and_interior_differences(real_profile[None], shape, *grid)
            )
    lines = seams.line_and_other_differences(profiles, shape, seam_lines)
    if lines is not None and real_profile is not None:
        real_lines = seams.line_and_other_differences(real_profile[None], shape, seam_lines)
        assert real_lines is not None
        real = seams.seam_score(real_lines)
        if np.isfinite(real):
            replicates = bootstrap.ratio_replicates(lines[:, 0], lines[:, 1], counts)
            out["seam_difference"] = {**_with_interval(seams.seam_score(lines) - real, replicates), "lines": seam_lines}
    return out


def memorization_scores(training: TrainingFeatures, features: np.ndarray | None) -> dict[str, Score]:
    """Computes the scores of how near images are to the training images.

    Args:
      features: Features (n, d) of the images. None scores the held-out images themselves.

    Returns:
      `memorisation`, the ratio of the mean distances, and `memorized`, the share of images that are
      not farther than the 5th percentile of held-out images. Its entry `pairs` lists the nearest
      images: number, number of the training image, distance.

    Raises:
      ConfigError: All held-out images are training images.
    """
    held_out, pairs = training.held_out_distances, []
    distances = held_out
    if features is not None:
        distances, numbers = training.nearest(features)
        pairs = [[int(i), int(numbers[i]), float(distances[i])] for i in np.argsort(distances, kind="stable")[:PAIRS]]
    counts = bootstrap.resample_counts(len(distances))
    searched = {"searched": training.searched, "training": training.images}
    ratio = memorization_ratio(distances, held_out)
    threshold = float(np.percentile(held_out, MEMORIZED_PERCENTILE))
    replicates = bootstrap.mean_replicates(distances, counts) / held_out.mean()
    return {
        "memorisation": {**_with_interval(ratio, replicates), **searched},
        "memorized": {**share(distances <= threshold), "threshold": threshold, **searched, "pairs": pairs},
    }


def share(values: np.ndarray) -> Score:
    """Returns the share of true values (n,), with a Wilson interval."""
    hits, n = int(np.sum(values)), len(values)
    return {"value": hits / n, **bootstrap.wilson(hits, n)._asdict()}


def _with_interval(value: float, replicates: np.ndarray, deviation: float | None = None) -> Score:
    score = {"value": value, **bootstrap.interval(value, replicates)._asdict()}
    return score if deviation is None else {**score, "deviation": deviation}


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray) -> Score:
    """Returns the ratio of two sums over images (n,), with an interval."""
    value = float(scores.ratio(numerator.sum(), denominator.sum()))
    counts = bootstrap.resample_counts(len(numerator))
    return _with_interval(value, bootstrap.ratio_replicates(numerator, denominator, counts))


def mean_score(values: np.ndarray) -> Score:
    """Returns the mean of one value per image (n,), with an interval, the standard error and n."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {**ratio_of_sums(values, np.ones(len(values))), "standard_error": error, "n": len(values)}


def share_of_sums(numerator: np.ndarray, denominator: np.ndarray) -> Score:
    """Returns `ratio_of_sums` of numerators that are at most their denominators, with an interval inside [0, 1]."""
    return {name: min(max(x, 0.0), 1.0) for name, x in ratio_of_sums(numerator, denominator).items()}


_MAX_CELL_WIDTH = 40  # characters; longer values, for example prompts, are cut


def comparison_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of results of --mode=evaluate, one row each.

    The columns are the settings in which the images differ, the scores, and the costs. The last row
    has the scores of real images, if the results hold them.

    Raises:
      ConfigError: The protocols differ in more than the images, so the scores are not comparable.
    """
    first_result, first = results[0], results[0]["protocol"]
    for result in results[1:]:
        for field in ("reference", "network", "image", "scores", "n"):
            value, first_value = result["protocol"][field], first[field]
            if value != first_value:
                raise ConfigError(
                    f"scores of different protocols do not share a table: {field} {value!r} against {first_value!r}."
                )
    settings = [flatten_keys(result["protocol"]["images"]) for result in results]
    fields = [name for name in dict.fromkeys(name for s in settings for name in s) if _has_differences(settings, name)]
    costs = [x for x in ("solver_steps", "nfe", "passes", "seconds") if any(r.get("cost", {}).get(x) for r in results)]
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    lines = [[*(fields or ["images"]), *names, *costs]]
    for result, setting in zip(results, settings):
        row = [_format_value(setting.get(name)) for name in fields] or ["all"]
        row += [format_score(result["scores"].get(name)) for name in names]
        lines.append(row + [_format_value(result.get("cost", {}).get(name)) for name in costs])
    if real := first_result.get("real"):
        labels = ["real", *[""] * (len(lines[0]) - len(names) - len(costs) - 1)]
        lines.append([*labels, *(format_score(real["scores"].get(name)) for name in names), *[""] * len(costs)])
    return markdown_table(lines)


def mean_over_checkpoints(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Averages the scores of each setting over its checkpoints.

    Returns:
      A result for each setting with several checkpoints, with the scores that all of them have. Stored
      results of an earlier version may lack a score. The interval of a score is its range over checkpoints.
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
        shared = [name for name in first["scores"] if all(name in result["scores"] for result in group)]
        values = {name: [result["scores"][name]["value"] for result in group] for name in shared}
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
    text = text if len(text) <= _MAX_CELL_WIDTH else f"{text[: _MAX_CELL_WIDTH - 3]}..."
    return text.replace("|", r"\|")  # a bar would end the cell


def format_score(score: Score | None) -> str:
    return "" if score is None else f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. The first row is the header."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
