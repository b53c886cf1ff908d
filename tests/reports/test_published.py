"""Published scores can be computed again from the files beside them."""

import json
import pathlib

import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.evaluation import sample_scores
from madformer_jax.evaluation.judge import open_judge

RESULTS = pathlib.Path(__file__).parents[2] / "docs/results"
ABLATION = "512128772c4c"  # the base, seed 0


def check(c, published, judge_folder, features):
    c.evaluate.reference = str(judge_folder / "reference.npz")
    c.evaluate.network_path = str(judge_folder / "classifier.npz")
    judge = open_judge(c, str(judge_folder), c.evaluate.n)
    for name in ("reference", "network", "image"):
        assert judge.protocol[name] == published["protocol"][name]
    with np.load(features) as file:
        scores = sample_scores.compute_scores(c, judge, dict(file), labeled=True)
    for name, score in published["scores"].items():
        for part, value in score.items():
            assert scores[name][part] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, part)


def test_the_stored_features_and_judge_give_a_cell_of_the_ablations():
    folder = RESULTS / "ablations_cpu"
    result = json.loads((folder / f"runs/{ABLATION}/result.json").read_text())
    (published,) = result["evaluations"]
    c = schema.base()
    c.update_from_flattened_dict(result["config"])
    (judge_folder,) = (folder / "judges").iterdir()
    check(c, published, judge_folder, folder / f"features/{ABLATION}.npz")


def test_the_stored_features_and_judge_give_the_score_of_the_first_command():
    folder = RESULTS / "first_command"
    published = json.loads((folder / "evaluation.json").read_text())
    score = published["scores"]["FD-classifier"]
    printed = f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"
    assert printed in " ".join((RESULTS.parents[1] / "README.md").read_text().split())
    c = schema.base()
    with c.unlocked():
        c.update(json.loads((folder / "config.json").read_text()))
    check(c, published, folder, folder / "features.npz")
