"""Kills training runs at random moments and shows that nothing is lost.

    python -m tests.kill --runs=20 --terms=5 --folder=/tmp/kill

Each of `runs` training runs gets SIGKILL at a random moment, by turns between two saves and while a checkpoint is being written,
and each of `terms` gets SIGTERM; each is then started again, and must end with the state, bit for bit, of a run that nobody
disturbed. Runs are forked from this process, which has imported everything and not yet touched JAX's devices.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax import main, training
from madformer_jax.runtime import checkpoint, partitioning

STEPS = 20
GRACE = 30  # seconds that a run has to exit after SIGTERM


def settings(workdir: pathlib.Path, cache: pathlib.Path) -> list[str]:
    return [
        "main",
        f"--config={pathlib.Path(__file__).with_name('tiny.py')}:plain",
        f"--workdir={workdir}",
        f"--config.compilation_cache={cache}",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        "--config.train.checkpoint_every=4",
    ]


def fork(workdir: pathlib.Path, cache: pathlib.Path) -> int:
    """Starts a run in a process of its own, its output in workdir.log."""
    process = os.fork()
    if process:
        return process
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        status = main.main(settings(workdir, cache))
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(workdir: pathlib.Path, cache: pathlib.Path) -> float:
    """Runs to the end; returns the seconds that took."""
    began = time.monotonic()
    _, status = os.waitpid(fork(workdir, cache), 0)
    if status:
        raise SystemExit(f"{workdir} ended with {os.waitstatus_to_exitcode(status)}: see {workdir}.log")
    return time.monotonic() - began


def interrupt(
    workdir: pathlib.Path, cache: pathlib.Path, number: int, step: int, delay: float, saving: bool | None
) -> dict[str, object]:
    """Sends a signal `delay` seconds behind a step (0: behind the start), then or, where `saving` says so, at the first moment in
    or outside of a save; tells what it met.
    """
    process = fork(workdir, cache)
    log, due = pathlib.Path(f"{workdir}.log"), time.monotonic() + delay
    while step and f" step {step}/" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.001)
        due = time.monotonic() + delay

    def unfinished() -> list[pathlib.Path]:
        return list((workdir / "checkpoints").glob("*tmp*"))

    while time.monotonic() < due or (saving is not None and saving != bool(unfinished())):
        if os.waitpid(process, os.WNOHANG)[0]:
            return {"ended": "before the signal"}
        time.sleep(0.0005)
    met, sent = bool(unfinished()), time.monotonic()
    os.kill(process, number)
    _, status = os.waitpid(process, 0)
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return {
        "behind_step": step,
        "while_saving": met,
        "exit_seconds": round(time.monotonic() - sent, 2),
        "status": os.waitstatus_to_exitcode(status),
        "newest_step": max(steps, default=None),
    }


def final(c: ConfigDict, workdir: pathlib.Path) -> tuple[int, dict[str, object], object]:
    """Step, arrays and data state of the newest checkpoint of a run with config `c`."""
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    s = training.setup(c)
    _, abstract = training.create_state(s.model, s.tx, c.seed, mesh)
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        step, trees, data = checkpoints.restore({n: getattr(abstract, n) for n in checkpoint.ARRAYS}, data=True)
    return step, jax.device_get(trees), data


def run(folder: pathlib.Path, runs: int, terms: int, seed: int) -> list[dict[str, object]]:
    """All of it; one report a run.

    Raises:
      AssertionError: a run did not come to the same end, or took longer than `GRACE` to exit.
    """
    logging.set_verbosity(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    cache, chance = folder / "cache", random.Random(seed)
    seconds = finish(folder / "whole", cache)  # and fills the cache of compiled programs
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    reports = []
    for i in range(runs + terms):
        name = signal.SIGKILL if i < runs else signal.SIGTERM
        workdir, saving = folder / f"run_{i}", i % 2 == 1 if i < runs else None
        step, delay = chance.randrange(STEPS - 4), chance.uniform(0, 0.5)
        delay = delay if step else delay * seconds  # while it starts
        report = {"run": i, "signal": name.name, **interrupt(workdir, cache, name, step, delay, saving)}
        finish(workdir, cache)
        reports.append(report)
        print(json.dumps(report), flush=True)
    c, _ = main.parse(settings(folder, cache))
    expected = final(c, folder / "whole")
    for i, report in enumerate(reports):
        assert report["signal"] == "SIGKILL" or report.get("exit_seconds", 0) <= GRACE, report
        found = final(c, folder / f"run_{i}")
        assert (found[0], found[2]) == (expected[0], expected[2]), report
        jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    return reports


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--terms", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    given = parser.parse_args()
    done = run(given.folder, given.runs, given.terms, given.seed)
    saves = sum(bool(r.get("while_saving")) for r in done)
    slowest = max((r.get("exit_seconds", 0) for r in done if r["signal"] == "SIGTERM"), default=0)
    print(f"{len(done)} runs, {saves} met while saving, all bit-identical; SIGTERM to exit: {slowest} s at most")
