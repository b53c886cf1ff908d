"""Writes a made-up folder of a sweep, in which curves of different D cross."""

import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from madformer_jax.reports import results

PROTOCOL = {
    "n": 500, "reference": "r" * 12, "network": {"name": "classifier", "weights": "w" * 12},
    "image": {"size": 32}, "scores": {"seed": 2020},
}  # fmt: skip


def score(depth: int, steps: int, seed: int, blocks: int = 4) -> float:
    """Returns a distance. A large D has a lower floor but needs more steps."""
    noise = 0.15 * math.sin(12.9898 * (seed + 1) + 78.233 * depth + 3.7 * blocks)
    return 0.02 / depth**0.4 * (1 + 0.1 * abs(math.log2(blocks / 4))) * (1 + noise) + 0.1 * depth / steps**1.4


def write(
    folder: pathlib.Path,
    *,
    depths: Sequence[int] = (1, 2, 4, 8),
    blocks: Sequence[int] = (4,),
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = (2, 4, 8, 16, 32, 64),
    sampled: Sequence[Mapping[str, Any]] = ({},),
    planned: Sequence[Mapping[str, Any]] = (),
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    measured: bool = True,
    scores: Sequence[str] = ("KID-classifier", "FD-classifier", "recognised"),
) -> list[str]:
    """Writes runs, plan and grids, and returns the names of the runs.

    `extra` maps the name of a run to further overrides. Its key "protocol" changes the protocol of the
    run's scores.
    """
    plan = []
    for depth, block, seed in itertools.product(depths, blocks, seeds):
        name = f"d{depth}l{block}s{seed}"
        more = dict((extra or {}).get(name, {}))
        protocol = PROTOCOL | more.pop("protocol", {})
        several = {"model.blocks": block} if len(blocks) > 1 else {}
        overrides = {"model.diffusion_depth": depth, **several, "seed": seed, **more}
        run = folder / "runs" / name
        run.mkdir(parents=True)
        evaluations = [_evaluation(depth, block, seed, n, s, protocol, scores) for s in sampled for n in steps]
        result = {
            "name": name, "sweep": "depth", "variant": "cpu", "seed": seed, "overrides": overrides,
            "config": {"model.depth": 8, "train.steps": 600} | overrides,
            "training": {
                "steps": 600, "images": 38400, "flops": 1e14, "final_loss": 0.03 + 0.001 * seed,
                "curve": [{"step": 600, "loss": 0.03}],
            },
            "evaluations": evaluations, "grid": None, "grid_rows": [], "versions": {"jax": "0.10.2", "platform": "cpu"},
        }  # fmt: skip
        if seed == seeds[0]:
            result |= {"grid": "grid.png", "grid_rows": list(range(len(steps)))}
            _grid(run / "grid.png", len(steps), depth)
            timing = {"overrides": {}, "fixed": 0.002, "per_step": 0.001 + 0.001 * depth, "batch": 64}
            if measured:
                (run / "timing.json").write_text(json.dumps({**timing, "evaluations": [timing]}))
        (run / "result.json").write_text(json.dumps(result))
        plan.append({"name": name, "overrides": overrides})
    question = "Is a small D better under a small sampling budget, and a large D under a large one?"
    content = {"sweep": "depth", "variant": "cpu", "question": question, "runs": [*plan, *planned]}
    (folder / "sweep.json").write_text(json.dumps(content))
    return [run["name"] for run in plan]


def load_group(folder: pathlib.Path, **settings: Any) -> results.ProtocolGroup:
    """Writes a folder and returns its only group."""
    write(folder, **settings)
    (group,) = results.load_results(str(folder)).groups
    return group


def change(folder: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Applies a function to the content of each result.json, in place."""
    for path in sorted(folder.glob("runs/*/result.json")):
        result = json.loads(path.read_text())
        edit(result)
        path.write_text(json.dumps(result))


def _evaluation(
    depth: int, blocks: int, seed: int, steps: int, sampled: Mapping[str, Any], protocol: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    value = score(depth, steps, seed, blocks)
    right = 1 - math.tanh(3 * value) * 0.9
    images = {"step": 600, "fingerprint": f"{depth}{seed}", "seed": seed, "weights": "ema", "steps": steps}
    images |= (
        {"spacing": "trailing"}
        | {name.removeprefix("sample."): x for name, x in sampled.items()}
        | protocol.get("images", {})
    )
    scores = {
        "KID-classifier": {"value": value, "low": 0.9 * value, "high": 1.1 * value, "deviation": 0.001},
        "FD-classifier": {"value": 900 * value + 4, "low": 850 * value, "high": 1000 * value + 5},
        "recognised": {"value": right, "low": right - 0.02, "high": right + 0.02},
    }
    nfe = (8 - depth + steps * depth) / 8
    return {
        "overrides": sampled, "budget": {"kind": "steps", "asked": steps},
        "cost": {"solver_steps": steps, "nfe": nfe, "passes": nfe + 0.75, "flops": 1e9 * (8 + steps * depth)},
        "scores": {name: scores[name] for name in names}, "protocol": {**protocol, "images": images},
    }  # fmt: skip


def _grid(path: pathlib.Path, rows: int, depth: int) -> None:
    y, x = np.mgrid[: 32 * rows, : 32 * 8]
    picture = 127 + 120 * np.sin(x / 5 + depth) * np.cos(y / 7)
    Image.fromarray(picture.astype(np.uint8)).save(path)
