"""Runs the modes one after the other with their workdir in a bucket, and kills the first training in the middle of a save.

    python -m tests.support.cloud FOLDER

Prints, as JSON, what the bucket then holds and how each run ended. Runs are forked from this process, which has imported
everything and not yet touched JAX's devices; their output goes to FOLDER.
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
from clu import metric_writers  # noqa: F401

from madformer_jax.cli import command_line
from madformer_jax.evaluation.networks import classifier
from madformer_jax.modes import evaluate, export, prepare, reference, sample, tokenizer, train  # noqa: F401
from tests.support import bucket

TINY = pathlib.Path(__file__).with_name("tiny.py")


def start(folder: pathlib.Path, name: str, *flags: str) -> int:
    """A command line in a process of its own, its output in folder/name.log."""
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


def end(process: int, until: Callable[[], bool] | None = None) -> int:
    """The exit status of a process, which is killed as soon as `until` holds."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until and until():
            os.kill(process, signal.SIGKILL)
            until = None
        time.sleep(0.02)


def untrained(*given: object) -> classifier.Classifier:
    """A classifier that has learned nothing, in place of a minute of training."""
    return classifier.Classifier(classifier.init(jax.random.key(0), 10, 1), 10, 1, accuracy=0.1, held_out=1)


def run(folder: pathlib.Path) -> dict[str, object]:
    """All of it. Names of objects with their sizes, and the exit statuses by the name of the log."""
    with bucket.serve() as (store, environment):
        os.environ.update(environment)
        workdir = "--workdir=gs://bucket/run"
        training = (f"--config={TINY}:plain", workdir, "--config.train.steps=4")  # and a checkpoint every second

        def saving() -> bool:
            begun = any(name.startswith("run/checkpoints/4/") for name in list(store.objects))
            return begun and "run/checkpoints/4/commit_success.txt" not in store.objects

        store.fail += [("run/checkpoints/4/commit_success.txt", 503)] * 100  # killed before step 4 is complete
        ends = {"killed": end(start(folder, "killed", *training), saving)}
        assert saving()
        store.fail.clear()
        ends["resumed"] = end(start(folder, "resumed", *training))
        ends["export"] = end(start(folder, "export", "--mode=export", workdir))  # the config is the workdir's
        store.fail += [("export/checkpoints/4/ema/_METADATA", 503), ("export/config.json", 503)]
        ends["exported"] = end(start(folder, "exported", "--mode=sample", "--workdir=gs://bucket/run/export"))
        classifier.train = untrained
        for mode in ("reference", "evaluate"):
            ends[mode] = end(start(folder, mode, f"--mode={mode}", workdir, "--config.evaluate.n=50"))
        largest = max((n for n in store.objects if "/4/ema/ocdbt" in n and n.startswith("run/ch")), key=store.size)
        store.objects[largest] = bytes([store.objects[largest][0] ^ 1]) + store.objects[largest][1:]
        ends["damaged"] = end(start(folder, "damaged", "--mode=sample", workdir))
        words = ("--config.text.vocabulary=270", "--config.text.length=8", "--config.text.caption=class")
        ends["tokenizer"] = end(
            start(folder, "tokenizer", "--mode=tokenizer", training[0], "--workdir=gs://bucket/words", *words)
        )
        prepare = ("--mode=prepare", training[0], "--workdir=gs://bucket/data", "--config.prepare.shard=2000")
        ends["prepare"] = end(start(folder, "prepare", *prepare))
        ends["no_bucket"] = end(start(folder, "no_bucket", training[0], "--workdir=gs://nobucket/run"))
        return {"ends": ends, "objects": {name: store.size(name) for name in store.objects}, "failures": store.fail}


if __name__ == "__main__":
    print(json.dumps(run(pathlib.Path(sys.argv[1]))))
