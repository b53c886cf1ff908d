"""Kills training and sampling at random moments and checks that nothing is lost.

    python -m tests.kill --runs=20 --terms=5 --samples=5 --folder=/tmp/kill

Each of `runs` trainings gets SIGKILL at a random moment: in turn during a save, during a sample grid, or
between them. The first `terms` of them continue and get SIGTERM or SIGINT at another moment. Each is then
started again. It must end with exactly the state of an undisturbed run, and with each step once in
metrics.jsonl. Each of `samples` runs of --mode=sample gets SIGKILL too, and must end with the images of an
undisturbed run, each once. Runs are forked from this process, which has imported all modules but has not
initialized JAX's devices.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.cli import command_line
from madformer_jax.modes import sample, train  # noqa: F401
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import generation
from madformer_jax.training import hooks, train_step

STEPS = 20
SHARDS = 8
GRACE = 30  # seconds that a run has to exit after SIGTERM or SIGINT
TURNS = ("in a save", "in a grid", "between")


def settings(workdir: pathlib.Path, cache: pathlib.Path, mode: str = "train") -> list[str]:
    return [
        "main",
        f"--config={pathlib.Path(__file__).with_name('tiny.py')}:plain",
        f"--workdir={workdir}",
        f"--mode={mode}",
        f"--config.compilation_cache={cache}",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        "--config.train.checkpoint_every=4",
        "--config.train.sample_every=6",
        "--config.sample.steps=100",  # long enough to be hit by a signal
        "--config.sample.batch=2",
        "--config.sample.grid=6",
        "--config.sample.shard=2",
        f"--config.sample.n={2 * SHARDS}",
    ]


def with_mark(workdir: pathlib.Path) -> Callable[..., None]:
    """Returns `SampleGrid.run` that keeps a file while it draws."""
    mark, draw = pathlib.Path(f"{workdir}.drawing"), hooks.SampleGrid.run

    def draw_with_mark(self: hooks.SampleGrid, *given: Any) -> None:
        mark.touch()
        draw(self, *given)
        mark.unlink()

    return draw_with_mark


def fork(workdir: pathlib.Path, cache: pathlib.Path, mode: str = "train") -> int:
    """Starts a run in a forked process, which writes its output to workdir.log. Returns its process id."""
    pathlib.Path(f"{workdir}.drawing").unlink(missing_ok=True)
    process = os.fork()
    if process:
        return process
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        hooks.SampleGrid.run = with_mark(workdir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        status = command_line.main(settings(workdir, cache, mode))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(workdir: pathlib.Path, cache: pathlib.Path, mode: str = "train") -> float:
    """Completes a run and returns how many seconds it took.

    Raises:
      SystemExit: The run has failed.
    """
    began = time.monotonic()
    _, status = os.waitpid(fork(workdir, cache, mode), 0)
    if status:
        raise SystemExit(f"{workdir} ended with {os.waitstatus_to_exitcode(status)}: see {workdir}.log")
    return time.monotonic() - began


def interrupt(
    process: int, number: int, due: Callable[[], bool], delay: float, moment: Callable[[], bool]
) -> dict[str, Any]:
    """Sends a signal at the first `moment` at least `delay` seconds after `due` holds. Returns a report."""
    since = None
    while since is None or time.monotonic() < since + delay or not moment():
        since = time.monotonic() if since is None and due() else since
        if os.waitpid(process, os.WNOHANG)[0]:
            return {"ended": "before the signal"}
        time.sleep(0.0005)
    sent = time.monotonic()
    os.kill(process, number)
    _, status = os.waitpid(process, 0)
    return {"exit_seconds": round(time.monotonic() - sent, 2), "status": os.waitstatus_to_exitcode(status)}


def disturb(
    workdir: pathlib.Path, cache: pathlib.Path, name: signal.Signals, turn: str, first: int, chance: random.Random
) -> dict[str, Any]:
    """Trains until a signal at a random moment of kind `turn`, after a random step from `first` on."""
    log = pathlib.Path(f"{workdir}.log")
    offset = log.stat().st_size if log.exists() else 0
    step, delay = chance.randrange(first, STEPS - 4), chance.uniform(0, 0.3)

    def is_due() -> bool:
        done = re.findall(rb" step (\d+)/", log.read_bytes()[offset:]) if log.exists() else []
        return not step or any(int(n) >= step for n in done)

    def current_turn() -> str:
        if list((workdir / "checkpoints").glob("*tmp*")):
            return "in a save"
        return "in a grid" if pathlib.Path(f"{workdir}.drawing").exists() else "between"

    process = fork(workdir, cache)
    report = {"run": workdir.name, "signal": name.name, "turn": turn, "behind_step": step}
    report |= interrupt(process, name, is_due, delay, lambda: current_turn() == turn)
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    report["newest_step"] = max(steps, default=0)
    print(json.dumps(report), flush=True)
    return report


def final(c: ConfigDict, workdir: pathlib.Path) -> tuple[int, dict[str, Any], Any]:
    """Returns step, arrays and data state of the newest checkpoint of a run with config `c`."""
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    s = train_step.make_setup(c)
    _, abstract = train_step.create_state(s.model, s.tx, c.seed, mesh, c.train.ema_snapshots > 0)
    with checkpoint.Checkpoints(str(workdir), read_only=True) as checkpoints:
        step, trees, data = checkpoints.restore(checkpoint.array_items(abstract), data=True)
    return step, jax.device_get(trees), data


def drawn(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers and images of the only finished sampling."""
    (folder,) = (path.parent for path in (workdir / "samples").glob("*/grid.png"))
    shards = list(generation.read_shards(folder))
    return np.concatenate([s.numbers for s in shards]), np.concatenate([s.images for s in shards])


def run(folder: pathlib.Path, runs: int, terms: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """Runs all trainings and samplings, and returns a report for each signal.

    Raises:
      AssertionError: A run ended with another state, or took longer than `GRACE` seconds to exit.
    """
    logging.set_verbosity(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    cache, chance = folder / "cache", random.Random(seed)
    seconds = finish(folder / "whole", cache)  # also fills the cache of compiled programs
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    reports = []
    for i in range(runs):
        workdir = folder / f"run_{i}"
        report = disturb(workdir, cache, signal.SIGKILL, TURNS[i % 3], 0, chance)
        reports.append(report)
        if i < terms:
            name = (signal.SIGTERM, signal.SIGINT)[i % 2]
            first = report["newest_step"] + 1
            reports.append(disturb(workdir, cache, name, TURNS[(i + 1) % 3], min(first, STEPS - 5), chance))
        finish(workdir, cache)
    reports += [disturb_sampling(folder, i, cache, chance) for i in range(samples)]
    c, _ = command_line.parse(settings(folder, cache))
    expected = final(c, folder / "whole")
    for i in range(runs):
        workdir = folder / f"run_{i}"
        jax.tree.map(np.testing.assert_array_equal, final(c, workdir), expected)
        steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1)), (workdir, steps)
    for report in reports:
        assert report["signal"] == "SIGKILL" or report.get("exit_seconds", 0) <= GRACE, report
    return reports


def disturb_sampling(folder: pathlib.Path, i: int, cache: pathlib.Path, chance: random.Random) -> dict[str, Any]:
    """Kills --mode=sample after a random shard and starts it again.

    Raises:
      AssertionError: The images are not those of an undisturbed run, each once.
    """
    if not i:
        finish(folder / "whole", cache, "sample")
    workdir = folder / f"sample_{i}"
    shutil.copytree(folder / "whole", workdir, ignore=shutil.ignore_patterns("samples"))
    count, delay = chance.randrange(1, SHARDS - 1), chance.uniform(0, 0.1)

    def shards() -> int:
        return len(list((workdir / "samples").glob("*/shard-*.npz")))

    process = fork(workdir, cache, "sample")
    report = {"run": workdir.name, "signal": "SIGKILL", "turn": "sampling"}
    report |= interrupt(process, signal.SIGKILL, lambda: shards() >= count, delay, lambda: True) | {"shards": shards()}
    finish(workdir, cache, "sample")
    (numbers, images), (_, expected) = drawn(workdir), drawn(folder / "whole")
    np.testing.assert_array_equal(numbers, np.arange(2 * SHARDS))
    np.testing.assert_array_equal(images, expected)
    print(json.dumps(report), flush=True)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--terms", type=int, default=5)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    given = parser.parse_args()
    done = run(given.folder, given.runs, given.terms, given.samples, given.seed)
    met = {turn: sum(r["turn"] == turn and "ended" not in r for r in done) for turn in (*TURNS, "sampling")}
    slowest = max((r.get("exit_seconds", 0) for r in done if r["signal"] != "SIGKILL"), default=0)
    print(
        f"{len(done)} signals ({', '.join(f'{n} {turn}' for turn, n in met.items())}), all bit-identical; to exit: {slowest} s"
    )
