"""Measures the border between kept and drawn blocks of edited pictures.

    python -m benchmarks.edit_seams --workdir=runs/any_order --n=200

Keeps the left and the upper half of held-out images and of the model's own samples, draws the other half
and measures the seam score at the border between the halves. The same line is measured in images that
are drawn as a whole and in the held-out images. The model must have random order and blocks that tile the halves.
"""

import argparse

import numpy as np

import madformer_jax
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import pipeline, sources
from madformer_jax.evaluation import seams

RESAMPLES = 1000


def run(workdir: str, n: int, guidance: float, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Prints and returns the seam score of each kind of image, with 95 % intervals over the images."""
    model = madformer_jax.load(workdir)
    c = model.config.copy_and_resolve_references()
    source, side = sources.open_source(c, c.evaluate.split), c.data.image_size
    n = min(n, len(source))
    examples = source.read(np.random.default_rng(seed).permutation(len(source))[:n])
    real = pipeline.make_preprocessor(c).process_batch(examples.arrays["image"])
    labels = {"labels": examples.labels.tolist()} if c.model.classes else {}
    halves = [np.zeros((side, side), bool) for _ in range(2)]
    halves[0][:, : side // 2] = halves[1][: side // 2] = True
    settings = {"batch": 50, "seed": seed, "guidance": guidance, **labels}
    whole = model.sample(n, **settings)
    kinds = {"drawn as a whole": [whole] * 2}
    for name, pictures in (("edited held-out images", real), ("edited samples", whole)):
        kinds[name] = [model.sample(image=pictures, mask=half, **settings | {"seed": seed + 1}) for half in halves]
    kinds["held-out images"] = [real] * 2
    sizes, scores, replicates = derive_sizes(c), {}, {}
    for name, images in kinds.items():
        steps = np.concatenate(
            [seams.middle_differences(x, sizes.grid, sizes.columns, axis) for x, axis in zip(images, (1, 0))]
        )
        picks = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
        replicates[name] = np.array([seams.seam_score(steps[np.concatenate([pick, pick + n])]) for pick in picks])
        scores[name] = (seams.seam_score(steps), *np.quantile(replicates[name], (0.025, 0.975)).tolist())
        interval = np.quantile(replicates[name] - replicates["drawn as a whole"], (0.025, 0.975))
        difference = scores[name][0] - scores["drawn as a whole"][0]
        across, inside = steps.mean(axis=0)
        print(
            "{}: seam at the middle line {:.2f} [{:.2f}, {:.2f}]".format(name, *scores[name]),
            "minus drawn as a whole {:.2f} [{:.2f}, {:.2f}]".format(difference, *interval),
            f"difference of adjacent pixels {across:.1f} across it and {inside:.1f} inside blocks, in gray levels",
            sep="; ",
            flush=True,
        )
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    run(args.workdir, args.n, args.guidance)
