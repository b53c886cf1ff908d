"""Command line for a process that receives a signal at a certain training step.

    MADFORMER_SIGNAL="1:7:KILL" python -m tests.support.worker ...

takes the arguments of main.py. It sends SIGKILL to process 1 after step 7. tests/test_distributed.py runs
it. If MADFORMER_SAMPLE is set, the process also samples and evaluates after training, which saves
another start. The processes then fail, first all of them and then all but one.
"""

import os
import signal
import sys
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict

from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.evaluation import shards
from madformer_jax.modes import evaluate, reference, sample, train
from madformer_jax.runtime import partitioning


def evaluate_few(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates the images of a file in batches of three and returns the scores.

    The last batch is one image, of which only one of two processes gets a row.
    """
    c = c.copy_and_resolve_references()
    c.evaluate.reference, c.evaluate.images = f"{workdir}/reference.npz", f"{workdir}/few.npz"
    c.evaluate.network_path = f"{workdir}/classifier.npz"
    with mock.patch.object(shards, "MAX_BATCH", 3):
        return evaluate.run(c, f"{workdir}/few")["results"][0]["scores"]


def run(argv: list[str]) -> int:
    """Runs the command line and returns its exit status."""
    process, signal_step, name = os.environ.get("MADFORMER_SIGNAL", "-1:-1:TERM").split(":")
    add = train.MetricWriter.add

    def add_and_signal(self: train.MetricWriter, step: int, metrics: Any) -> None:
        if (jax.process_index(), step) == (int(process), int(signal_step)):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        add(self, step, metrics)

    train.MetricWriter.add = add_and_signal
    status = command_line.main(argv)
    if status == 0 and "MADFORMER_SAMPLE" in os.environ:
        c, values = command_line.parse(argv)
        schema.validate(c)
        for mode in (sample, reference, evaluate):
            mode.run(c, values.workdir)
        evaluate_few(c, values.workdir)
        assert partitioning.all_failed()
        partitioning.PEER_TIMEOUT_SECONDS = 0.5
        assert jax.process_index() == 1 or not partitioning.all_failed()
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv))
