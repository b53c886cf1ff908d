"""Measures which degradations of real images a feature network detects.

    python -m benchmarks.degradations --network=alexnet --workdir=runs/degradations

It compares pictures of the split "train" of `drawings` with those of the split "test", without and
with noise, blur and offsets of blocks, and prints FD and KID with intervals (docs/evaluation.md). It
trains the networks that learn from the data set. --weights names the weights of `inception`. A later
call continues with the files in the workdir.
"""

import argparse
import os

from madformer_jax.evaluation.networks import registry
from madformer_jax.modes import evaluate, reference
from madformer_jax.runtime import xla_flags

DEGRADATIONS = ("", "noise:4", "noise:8", "noise:16", "blur:0.5", "blur:1", "blocks:4", "blocks:8", "blocks:16")


def score(network: str, workdir: str, weights: str, side: int, n: int) -> None:
    from configs import drawings

    c = drawings.get_config(f"side={side}")
    c.evaluate.network, c.evaluate.network_path, c.evaluate.n = network, weights, n
    c.evaluate.images, workdir = "data:train", os.path.join(workdir, network)
    if not os.path.exists(os.path.join(workdir, "reference.npz")):
        reference.run(c, workdir)
    names = [registry.network_class(network).score_name(x) for x in ("FID", "KID")]
    rows = []
    for c.evaluate.degrade in DEGRADATIONS:
        scores = evaluate.run(c, workdir)["results"][0]["scores"]
        cells = [f"{scores[x]['value']:.3g} [{scores[x]['low']:.3g}, {scores[x]['high']:.3g}]" for x in names]
        rows.append(f"| {c.evaluate.degrade or 'none'} | {' | '.join(cells)} |")
    print("\n".join([f"| degradation | {' | '.join(names)} |", "|---|---|---|", *rows]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="alexnet", choices=registry.NETWORKS)
    parser.add_argument("--workdir", default="runs/degradations")
    parser.add_argument("--weights", default="")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--n", type=int, default=900)
    args = parser.parse_args()
    xla_flags.disable_ynnpack("")
    score(args.network, args.workdir, args.weights, args.side, args.n)
