"""Runs the modes one after the other with their workdirs in a bucket.

    python -m tests.support.cloud FOLDER

tests/test_cloud.py runs it. The first training is killed in the middle of a save. Prints the objects of
the bucket and the exit status of each run as JSON. Runs are forked from this process, which has
imported everything but has not used JAX's devices. Their output goes to FOLDER.
"""

import json
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tensorflow  # noqa: F401

from madformer_jax.cli import command_line
from madformer_jax.evaluation.networks import classifier
from madformer_jax.modes import evaluate, export, prepare, reference, sample, tokenizer, train  # noqa: F401
from tests.support import bucket

TINY = pathlib.Path(__file__).parent.parent / "tiny.py"


def start(folder: pathlib.Path, name: str, *flags: str) -> int:
    """Runs a command line in a forked process, with its output in folder/name.log."""
    if process := os.fork():
        return process
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    status = 1
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        status = command_line.main(["main", *flags, f"--config.compilation_cache={folder / 'cache'}"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, kill_if: Callable[[], bool] | None = None) -> int:
    """Waits for a process, kills it once `kill_if` holds, and returns its exit status."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if kill_if and kill_if():
            os.kill(process, signal.SIGKILL)
            kill_if = None
        time.sleep(0.02)


def untrained_classifier(*args: object) -> classifier.Classifier:
    """Returns an untrained classifier, which saves a minute of training."""
    return classifier.Classifier(classifier.init(jax.random.key(0), 10, 1), 10, 1, accuracy=0.1, held_out=1)


def run(folder: pathlib.Path) -> dict[str, object]:
    """Runs all commands.

    Returns:
      Exit statuses by the name of the log, object sizes by name, and failures that no request met.
    """
    with bucket.serve() as (store, environment):
        os.environ.update(environment)
        workdir = "--workdir=gs://bucket/run"
        training = (
            f"--config={TINY}:plain",
            workdir,
            "--config.train.steps=4",
            "--config.train.log_to=tensorboard",
        )  # saves every second step

        def saving() -> bool:
            started = any(name.startswith("run/checkpoints/4/") for name in list(store.objects))
            return started and "run/checkpoints/4/commit_success.txt" not in store.objects

        # The kill comes before step 4 is complete.
        store.fail += [("run/checkpoints/4/commit_success.txt", 503)] * 100
        statuses = {"killed": wait(start(folder, "killed", *training), saving)}
        assert saving()
        store.fail.clear()
        statuses["resumed"] = wait(start(folder, "resumed", *training))
        # --mode=export takes the config of the workdir.
        statuses["export"] = wait(start(folder, "export", "--mode=export", workdir))
        store.fail += [("export/checkpoints/4/ema/_METADATA", 503), ("export/config.json", 503)]
        statuses["exported"] = wait(start(folder, "exported", "--mode=sample", "--workdir=gs://bucket/run/export"))
        classifier.train = untrained_classifier
        for mode in ("reference", "evaluate"):
            statuses[mode] = wait(start(folder, mode, f"--mode={mode}", workdir, "--config.evaluate.n=50"))
        largest = max((n for n in store.objects if "/4/ema/ocdbt" in n and n.startswith("run/ch")), key=store.size)
        store.objects[largest] = bytes([store.objects[largest][0] ^ 1]) + store.objects[largest][1:]
        statuses["damaged"] = wait(start(folder, "damaged", "--mode=sample", workdir))
        text = ("--config.text.vocabulary=270", "--config.text.length=8", "--config.text.caption=class")
        statuses["tokenizer"] = wait(
            start(folder, "tokenizer", "--mode=tokenizer", training[0], "--workdir=gs://bucket/words", *text)
        )
        prepare = ("--mode=prepare", training[0], "--workdir=gs://bucket/data", "--config.prepare.shard=2000")
        statuses["prepare"] = wait(start(folder, "prepare", *prepare))
        statuses["no_bucket"] = wait(start(folder, "no_bucket", training[0], "--workdir=gs://nobucket/run"))
        return {"ends": statuses, "objects": {name: store.size(name) for name in store.objects}, "failures": store.fail}


if __name__ == "__main__":
    print(json.dumps(run(pathlib.Path(sys.argv[1]))))
