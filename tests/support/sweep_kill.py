"""Kills a sweep at random moments and checks that its results are the same.

    python -m tests.support.sweep_kill --kills=3 --folder=/tmp/sweep_kill

One process runs a tiny sweep without interruption. Two concurrent processes run it again. One or both
of them are killed with SIGKILL `kills` times and restarted. Every result.json and the report of both
folders must be equal byte for byte. With `--together`, one command starts the two processes, and the
command or one of its processes is killed; only the command is restarted.
"""

import argparse
import os
import pathlib
import random
import shutil
import signal
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


def start(
    file: pathlib.Path, workdir: pathlib.Path, mode: str = "sweep", processes: int = 1
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "madformer_jax.main", f"--mode={mode}", f"--workdir={workdir}"]
    if mode == "sweep":
        command += [f"--config={file}", f"--processes={processes}"]
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill_and_restart(
    file: pathlib.Path, workdir: pathlib.Path, process: subprocess.Popen[bytes], rng: random.Random
) -> subprocess.Popen[bytes]:
    """Kills a command or one of its processes. Returns the command that runs then."""
    ids = [process.pid, *children(process)] if process.poll() is None else []
    if ids:
        os.kill(rng.choice(ids), signal.SIGKILL)
        time.sleep(1)
    return process if process.poll() is None else start(file, workdir, processes=2)


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
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    file, whole, killed = args.folder / "widths.py", args.folder / "whole", args.folder / "killed"
    tiny = pathlib.Path(__file__).parent.parent / "tiny.py"
    names = {"tiny": str(tiny), "cache": str(args.folder / "cache"), "network": str(args.folder / "classifier.npz")}
    file.write_text(SWEEP.format(**names))
    began = time.monotonic()
    finish(start(file, whole, processes=1 + args.together))  # one thread gives other roundings than several
    seconds = time.monotonic() - began
    print(f"without kills: {seconds:.0f} s", flush=True)
    rng = random.Random(args.seed)
    processes = [start(file, killed, processes=2)] if args.together else [start(file, killed), start(file, killed)]
    for kill in range(args.kills):
        time.sleep(rng.uniform(0.06, 0.12) * seconds)  # the second sweep takes less time, since the classifier exists
        if args.together:
            processes = [kill_and_restart(file, killed, processes[0], rng)]
            print(f"kill {kill + 1}: {len(list(killed.glob('runs/*/result.json')))} runs done", flush=True)
            continue
        chosen = rng.choice(([0], [1], [0, 1]))
        done = len(list(killed.glob("runs/*/result.json")))
        print(f"kill {kill + 1}: {len(chosen)} of 2 processes, {done} runs done", flush=True)
        for i in chosen:
            processes[i].kill()
            processes[i].wait()
            processes[i] = start(file, killed)
    finish(*processes)
    for workdir in (whole, killed):
        finish(start(file, workdir, "report"))
    same = results(whole) == results(killed)
    print(f"{len(results(whole))} files: {'equal' if same else 'NOT equal'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
