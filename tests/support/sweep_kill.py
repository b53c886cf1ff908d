"""Kills a sweep at random moments and shows that it ends in the same results.

    python -m tests.support.sweep_kill --kills=3 --folder=/tmp/sweep_kill

A tiny sweep is done by one process that nobody disturbs, and by two at once of which one or both get SIGKILL `kills` times, and
are started again. Every result.json must be the same, byte for byte, and so must the report of both folders.
"""

import argparse
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

SWEEP = """
import runpy

from madformer_jax.sweeps.sweep_file import Sweep, grid


def get_config():
    c = runpy.run_path({tiny!r})["get_config"]("plain")
    c.compilation_cache = {cache!r}
    c.model.classes, c.train.steps, c.evaluate.n, c.evaluate.network_path = 10, 40, 48, {network!r}
    c.train.checkpoint_every = 10
    return c


def sweep():
    return Sweep("Which width?", grid({{"model.width": (16, 24)}}, seeds=2), {{"steps": (1, 4)}})
"""


def start(file: pathlib.Path, workdir: pathlib.Path, mode: str = "sweep") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "madformer_jax.main", f"--mode={mode}", f"--workdir={workdir}"]
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(command + [f"--config={file}"] * (mode == "sweep"), stdout=log, stderr=log)


def finish(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        if process.wait():
            sys.exit(f"{process.args} ended with {process.returncode}")


def results(workdir: pathlib.Path) -> dict[str, bytes]:
    paths = [*workdir.glob("runs/*/result.json"), *workdir.glob("runs/*/grid.png"), workdir / "report" / "tables.md"]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    file, whole, disturbed = args.folder / "widths.py", args.folder / "whole", args.folder / "disturbed"
    tiny = pathlib.Path(__file__).with_name("tiny.py")
    names = {"tiny": str(tiny), "cache": str(args.folder / "cache"), "network": str(args.folder / "classifier.npz")}
    file.write_text(SWEEP.format(**names))
    began = time.monotonic()
    finish(start(file, whole))
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    rng = random.Random(args.seed)
    processes = [start(file, disturbed), start(file, disturbed)]
    for kill in range(args.kills):
        time.sleep(rng.uniform(0.06, 0.12) * seconds)  # less is left to do: the classifier is there
        chosen = rng.choice(([0], [1], [0, 1]))
        done = len(list(disturbed.glob("runs/*/result.json")))
        print(f"kill {kill + 1}: {len(chosen)} of 2 processes, {done} runs done", flush=True)
        for i in chosen:
            processes[i].kill()
            processes[i].wait()
            processes[i] = start(file, disturbed)
    finish(*processes)
    for workdir in (whole, disturbed):
        finish(start(file, workdir, "report"))
    same = results(whole) == results(disturbed)
    print(f"{len(results(whole))} files: {'the same, byte for byte' if same else 'NOT the same'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
