import types

import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.evaluation import judge, sample_scores
from madformer_jax.evaluation.judge import Judge
from madformer_jax.evaluation.networks import registry
from madformer_jax.sampling.generation import SampleBatch


def test_prompts_of_the_grid_open_the_attribute_classifier(monkeypatch, tmp_path):
    c, names = schema.base(), "data:test"
    monkeypatch.setattr(
        judge.prompts, "requested_attributes", lambda c: np.ones((1, 1)) if c.sample.prompts == names else None
    )
    monkeypatch.setattr(judge.attribute_classifier, "load", lambda path: path)
    (tmp_path / "attributes.npz").touch()
    opened = []
    for c.evaluate.grid in ("steps=3", f"steps=3;prompts=a,{names}"):
        opened.append(judge._open_attribute_classifier(c, str(tmp_path)))
    assert opened == [None, str(tmp_path / "attributes.npz")]


def test_attributes_are_predicted_batch_by_batch_and_scored(monkeypatch):
    """Two of the three requested attributes match. Value 0 requests nothing."""
    monkeypatch.setattr(sample_scores.prompts, "requested_attributes", lambda c: np.array([[1, 0], [2, 1]]))
    monkeypatch.setattr(sample_scores.score_summary, "compute_scores", lambda *args, **settings: {})
    predict = lambda classifier, images: images[:, 0, 0, :2].astype(np.int32)  # noqa: E731
    monkeypatch.setattr(sample_scores.attribute_classifier, "predict", predict)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[:, 0, 0, :2] = [[1, 5], [2, 0]]
    batches = [
        SampleBatch(np.array([i]), np.zeros(1, np.int32), images[i : i + 1], images[i : i + 1]) for i in range(2)
    ]

    def extract(images):
        return registry.NetworkOutputs(np.zeros((len(images), 3), np.float32), None)

    arrays = sample_scores.extract_features(batches, extract, classifier=object())
    assert "attributes" not in sample_scores.extract_features(batches, extract)
    judge = Judge(types.SimpleNamespace(name="classifier", metadata={}), extract, None, None, {})
    score = sample_scores.compute_scores(schema.base(), judge, arrays, labeled=False)["attributes"]
    assert score["value"] == pytest.approx(2 / 3)
    assert score["low"] <= score["value"] <= score["high"]
