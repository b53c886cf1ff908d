"""What a run tells of its steps."""

import json

import numpy as np

from madformer_jax import report
from tests import tiny


def test_metrics_tell_each_step_once(tmp_path):
    """Lines behind the checkpoint that a run goes on from, and half a line, are taken out."""
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    told = report.Report(tiny.get_config("plain"), str(tmp_path), 3, 1.0, 1)
    assert told.figures == {"step": 3, "loss": 3.0}

    def reports():
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert reports() == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "loss_q1": np.nan}
    told.add(4, metrics)
    told.add(5, metrics | {"loss": 2.0, "loss_q1": 3.0})
    told.write()
    told.close()
    line = reports()[-1]
    assert (line["step"], line["loss"], line["loss_q1"]) == (5, 1.5, 3.0)
