"""main.py for a process that is to die, or to be told to stop, at a certain step: `python -m tests.support.worker ...`.

MADFORMER_SIGNAL="1:7:KILL" sends SIGKILL to process 1 when it has done step 7. With MADFORMER_SAMPLE the process samples and
is judged as well once it has trained, which spares another start; and the processes fail, first all of them and then all but one.
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


def few(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Judges the images of a file in parts of three, of which a fourth process has no share; returns the scores."""
    c = c.copy_and_resolve_references()
    c.evaluate.reference, c.evaluate.images = f"{workdir}/reference.npz", f"{workdir}/few.npz"
    c.evaluate.network_path = f"{workdir}/classifier.npz"
    with mock.patch.object(shards, "MAX_BATCH", 3):
        return evaluate.run(c, f"{workdir}/few")["results"][0]["scores"]


def run(argv: list[str]) -> int:
    """Trains as `main.main` does; returns its status."""
    process, at, name = os.environ.get("MADFORMER_SIGNAL", "-1:-1:TERM").split(":")
    add = train.MetricWriter.add

    def signalled(self: train.MetricWriter, step: int, metrics: Any) -> None:
        if (jax.process_index(), step) == (int(process), int(at)):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        add(self, step, metrics)

    train.MetricWriter.add = signalled
    status = command_line.main(argv)
    if status == 0 and "MADFORMER_SAMPLE" in os.environ:
        c, values = command_line.parse(argv)
        schema.validate(c)
        for mode in (sample, reference, evaluate):
            mode.run(c, values.workdir)
        few(c, values.workdir)
        assert partitioning.all_failed()
        partitioning.PEER_TIMEOUT_SECONDS = 0.5
        assert jax.process_index() == 1 or not partitioning.all_failed()
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv))
