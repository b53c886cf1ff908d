"""Bits per dimension of small models of the digits for several numbers of blocks and training seeds.

    python -m benchmarks.held_out_seeds --folder=DIR --blocks=1,4,16 --seeds=1
    python -m benchmarks.held_out_seeds --folder=DIR --blocks=1 --seeds=10

Prints a row for each model. With four or more seeds it also compares all pairs of seeds, in which only
chance differs. For each score it prints the number of pairs that differ by less than an interval says:

    over images     the root of the sum of the squared half-widths of the two intervals
    paired          the interval of the difference over images contains 0
    over seeds      1.96 * sqrt(2) * the standard deviation over the other seeds
"""

import argparse
import glob
import itertools
import json
import os

import numpy as np
from absl import logging

from configs import digits
from madformer_jax.config import schema
from madformer_jax.evaluation import held_out_scores
from madformer_jax.modes import train

NAMES = ("bits_per_dimension", "bits_per_dimension_discrete", "held_out_loss_image")


def model_config(blocks: int, seed: int, steps: int, n: int):
    c = digits.get_config()
    c.seed, c.model.blocks = seed, blocks
    c.model.width, c.model.heads, c.model.mlp_width, c.model.depth, c.model.diffusion_depth = 32, 2, 64, 2, 1
    c.model.unet_channels, c.model.unet_time_width = (16,), 16
    c.train.steps, c.train.checkpoint_every, c.train.judge, c.train.log_to = steps, steps, False, ""
    c.train.ema_decay = 0.98
    c.evaluate.n, c.evaluate.held_out_n, c.mesh.data = 0, n, 1
    schema.validate(c)
    return c


def result_path(workdir: str, result) -> str:
    paths = glob.glob(os.path.join(workdir, "evaluations", "held_out", "*.json"))
    return next(path for path in paths if json.load(open(path))["protocol"] == result["protocol"])


def print_pairs(results: list, paths: list[str]) -> None:
    pairs = list(itertools.combinations(range(len(results)), 2))
    paired = {pair: held_out_scores.paired_differences(*(paths[i] for i in pair)) for pair in pairs}
    print("| score | deviation over seeds | pairs | over images | paired | over seeds |\n|---|---|---|---|---|---|")
    for name in NAMES:
        scores = [result["scores"][name] for result in results]
        x = np.array([score["value"] for score in scores])
        half = np.array([(score["high"] - score["low"]) / 2 for score in scores])
        apart = {(i, j): abs(x[i] - x[j]) for i, j in pairs}
        over_images = sum(apart[i, j] < np.hypot(half[i], half[j]) for i, j in pairs)
        contain_0 = sum(paired[pair][name]["low"] <= 0 <= paired[pair][name]["high"] for pair in pairs)
        over_seeds = sum(apart[pair] < 1.96 * 2**0.5 * np.delete(x, pair).std(ddof=1) for pair in pairs)
        counts = f"{len(pairs)} | {over_images} | {contain_0} | {over_seeds}"
        print(f"| {name} | {x.std(ddof=1):.4f} | {counts} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="where the models go; finished ones are read")
    parser.add_argument("--blocks", default="1")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--n", type=int, default=1000)
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    print("| L | seed | bits per dimension | discrete | image loss |\n|---|---|---|---|---|")
    for blocks in map(int, args.blocks.split(",")):
        results, paths = [], []
        for seed in range(args.seeds):
            c = model_config(blocks, seed, args.steps, args.n)
            workdir = os.path.join(args.folder, f"{blocks}_{seed}_{args.steps}")
            train.run(c.copy_and_resolve_references(), workdir, grids=False)
            (result,) = held_out_scores.run(c, workdir, held_out_scores.open_images(c))
            results.append(result)
            paths.append(result_path(workdir, result))
            cells = ["{value:.4f} [{low:.4f}, {high:.4f}]".format(**result["scores"][name]) for name in NAMES]
            print(f"| {blocks} | {seed} | {' | '.join(cells)} |", flush=True)
        if len(results) > 3:
            print_pairs(results, paths)


if __name__ == "__main__":
    main()
