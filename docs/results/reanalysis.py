"""Prints the comparisons of docs/testbed.md that the reports do not compute yet.

    python docs/results/reanalysis.py

It reads `runs/*/result.json` of the four sweeps beside it. Each line is a mean difference over training
seeds, paired by seed, with a 95 % t-interval. Nothing corrects for the number of comparisons.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).parent
SEEDS = (0, 1, 2)
Runs = dict[int, dict[str, Any]]  # seed -> content of result.json


def runs(sweep: str, key: Callable[[dict[str, Any]], Any]) -> dict[Any, Runs]:
    """Groups the runs of a sweep by `key` of their overrides."""
    groups: dict[Any, Runs] = {}
    for path in sorted((HERE / sweep / "runs").glob("*/result.json")):
        run = json.loads(path.read_text())
        groups.setdefault(key(run["overrides"]), {})[run["seed"]] = run
    return groups


def interval(differences: list[float]) -> str:
    """Formats the mean of the differences with its 95 % t-interval."""
    mean, deviation = np.mean(differences), np.std(differences, ddof=1)
    half = stats.t.ppf(0.975, len(differences) - 1) * deviation / math.sqrt(len(differences))
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def image_loss(run: dict[str, Any]) -> float:
    """Averages the image loss over the last 200 training steps."""
    curve = run["training"]["curve"]
    return float(np.mean([row["loss_image"] for row in curve if row["step"] > curve[-1]["step"] - 200]))


def score(run: dict[str, Any], name: str, steps: int) -> float:
    """Returns a score at a number of solver steps."""
    (found,) = {e["scores"][name]["value"] for e in run["evaluations"] if e["cost"]["solver_steps"] == steps}
    return found


def best_steps(group: Runs, name: str, budget: float) -> int:
    """Returns the step count with the best mean score whose NFE is within the budget (free disposal)."""
    costs = {e["cost"]["solver_steps"]: e["cost"].get("nfe", e["cost"]["passes"]) for e in group[0]["evaluations"]}
    affordable = [steps for steps, cost in costs.items() if cost <= 1.02 * budget]
    return min(affordable, key=lambda steps: np.mean([score(group[seed], name, steps) for seed in SEEDS]))


def main() -> None:
    print("Image loss, last 200 steps")
    switches = runs("conditioning_digits", lambda o: (o["model.ar_condition"], o["model.clean_stream"]))
    for title, key in (("no AR condition", (False, True)), ("no clean stream", (True, False))):
        loss = [image_loss(switches[key][s]) - image_loss(switches[True, True][s]) for s in SEEDS]
        recall = [
            score(switches[key][s], "recall-classifier", 20) - score(switches[True, True][s], "recall-classifier", 20)
            for s in SEEDS
        ]
        print(f"  {title}, minus both: {interval(loss)}; recall at 20 steps {interval(recall)}")
    for data in ("digits", "drawings"):
        depths = runs(f"depth_{data}", lambda o: o["model.diffusion_depth"])
        loss = [image_loss(depths[1][s]) - image_loss(depths[4][s]) for s in SEEDS]
        print(f"  {data}, D = 1 minus D = 4: {interval(loss)}")
    for data, network in (("digits", "classifier"), ("drawings", "attributes")):
        depths = runs(f"depth_{data}", lambda o: o["model.diffusion_depth"])
        for name in (f"FD-{network}", f"KID-{network}"):
            print(f"{data}, {name}: D = 1 minus D = 4, each at its best step count within the budget")
            for budget in (2, 4, 8, 16, 32) if data == "drawings" else (4, 8, 16, 32):
                steps = {D: best_steps(depths[D], name, budget) for D in (1, 4)}
                values = [score(depths[1][s], name, steps[1]) - score(depths[4][s], name, steps[4]) for s in SEEDS]
                print(f"  NFE {budget}: {interval(values)}, at {steps[1]} and {steps[4]} solver steps")
    sizes = runs("blocks_drawings", lambda o: (o["data.image_size"], o["model.blocks"]))
    for name in ("FD-attributes", "KID-attributes", "precision-attributes"):
        print(f"blocks, {name}, minus L = 1")
        for size, blocks in [(size, blocks) for size in (32, 64, 128) for blocks in (4, 16)]:
            values = [score(sizes[size, blocks][s], name, 20) - score(sizes[size, 1][s], name, 20) for s in SEEDS]
            print(f"  {size} px, L = {blocks}: {interval(values)}")
    values = [score(sizes[128, 16][s], "seam", 20) - score(sizes[128, 4][s], "seam", 20) for s in SEEDS]
    print(f"seam at 128 px, L = 16 minus L = 4: {interval(values)}")


if __name__ == "__main__":
    main()
