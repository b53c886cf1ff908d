"""Published scores can be computed again from the files beside them."""

import json
import pathlib

import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.evaluation import sample_scores
from madformer_jax.evaluation.judge import open_judge

RESULTS = pathlib.Path(__file__).parents[2] / "docs/results/ablations_cpu"
RUN = "512128772c4c"  # the base, seed 0


def test_the_stored_features_and_judge_give_a_cell_of_the_ablations():
    result = json.loads((RESULTS / f"runs/{RUN}/result.json").read_text())
    (published,) = result["evaluations"]
    c = schema.base()
    c.update_from_flattened_dict(result["config"])
    (judge_folder,) = (RESULTS / "judges").iterdir()
    c.evaluate.reference = str(judge_folder / "reference.npz")
    c.evaluate.network_path = str(judge_folder / "classifier.npz")
    judge = open_judge(c, str(RESULTS), c.evaluate.n)
    for name in ("reference", "network", "image"):
        assert judge.protocol[name] == published["protocol"][name]
    with np.load(RESULTS / f"features/{RUN}.npz") as file:
        scores = sample_scores.compute_scores(c, judge, dict(file), labeled=True)
    for name, score in published["scores"].items():
        for part, value in score.items():
            assert scores[name][part] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, part)
