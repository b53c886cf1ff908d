"""Bits per dimension of small models of the digits for several numbers of blocks and training seeds.

    python -m benchmarks.held_out_seeds --folder=DIR --blocks=1,4,16 --seeds=1
    python -m benchmarks.held_out_seeds --folder=DIR --blocks=1 --seeds=10

Prints a row for each model. With several seeds it also prints how often the bits of two neighboring seeds
differ by less than the root of the sum of the squared half-widths of their intervals.
"""

import argparse
import os

import numpy as np
from absl import logging

from configs import digits
from madformer_jax.config import schema
from madformer_jax.evaluation import held_out_scores
from madformer_jax.modes import train


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
        scores = []
        for seed in range(args.seeds):
            c = model_config(blocks, seed, args.steps, args.n)
            workdir = os.path.join(args.folder, f"{blocks}_{seed}_{args.steps}")
            train.run(c.copy_and_resolve_references(), workdir, grids=False)
            (result,) = held_out_scores.run(c, workdir, held_out_scores.open_images(c))
            scores.append(result["scores"])
            names = ("bits_per_dimension", "bits_per_dimension_discrete", "held_out_loss_image")
            cells = ["{value:.4f} [{low:.4f}, {high:.4f}]".format(**result["scores"][name]) for name in names]
            print(f"| {blocks} | {seed} | {' | '.join(cells)} |", flush=True)
        if len(scores) > 1:
            for name in names:
                x = np.array([(s[name]["value"], (s[name]["high"] - s[name]["low"]) / 2) for s in scores])
                other = np.roll(x, -1, axis=0)
                near = np.abs(x[:, 0] - other[:, 0]) < np.hypot(x[:, 1], other[:, 1])
                spread = x[:, 0].std(ddof=1)
                print(f"{name}: {near.sum()} of {len(near)} pairs; deviation over seeds {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()
