"""Compares the speed of this package with the yardstick, the same model in plain PyTorch, on one machine.

    python -m benchmarks.compare --config=configs/bench_mid.py

This command makes every figure "times as fast" in the docs. It starts one process for each side. The two
processes compute in turns (ours, yardstick, ours, yardstick, ...), never at once. In each turn a process
makes one call as a warm-up, times a large matrix product, and then times one call. The command prints
medians over the turns: the seconds, the rate of the product, the share of that rate, the seconds of all
cores of the host, and the ratio of the two sides in the same round. On a busy machine only the seconds
of the cores are of use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from madformer_jax.runtime.malloc import TUNABLES

# Settings of the yardstick, by name.
VARIANTS = {
    "eager": {"attention": "sdpa"},
    "eager-blocks": {"attention": "blocks"},
    "eager-nchw": {"attention": "sdpa", "channels_last": False},
    "eager-flex": {"attention": "flex"},
    "compiled": {"attention": "sdpa", "compile": "default"},
    "compiled-blocks": {"attention": "blocks", "compile": "default"},
    "compiled-flex": {"attention": "flex", "compile": "default"},
    "max-autotune": {"attention": "sdpa", "compile": "max-autotune"},
    "max-autotune-flex": {"attention": "flex", "compile": "max-autotune"},
}
DEFAULT = ("eager", "eager-blocks", "compiled", "compiled-blocks")
WORKLOADS = ("train", "sample")


class Worker:
    """A process that computes one side and waits between its turns."""

    def __init__(self, module: str, settings: dict[str, Any]):
        # Pages of 2 MiB for both sides, as the command line of this package sets them.
        env = {**os.environ, "GLIBC_TUNABLES": TUNABLES, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.facts = self._read()  # after compiling and warming up

    def turn(self) -> dict[str, float]:
        """Computes once and returns the seconds, and the TFLOP/s of the product beside them."""
        assert self.process.stdin
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                result: dict[str, Any] = json.loads(line)
                return result
        raise ChildProcessError(f"the process ended with status {self.process.wait()}; its message is above")


def compare(ours: Worker, yardstick: Worker, rounds: int) -> dict[str, Any]:
    """Lets both sides compute in turns.

    Returns:
      The facts and the medians of both sides, and the median, the lowest and the highest ratio of a round.
    """
    turns = [(ours.turn(), yardstick.turn()) for _ in range(rounds)]
    ratios = sorted(theirs["seconds"] / mine["seconds"] for mine, theirs in turns)
    sides = [
        worker.facts | {name: statistics.median(turn[n][name] for turn in turns) for name in turns[0][n]}
        for n, worker in enumerate((ours, yardstick))
    ]
    ratio = {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
    return {"ours": sides[0], "yardstick": sides[1], **ratio}


def row(result: dict[str, Any]) -> str:
    """Formats a result as a line of the table."""
    ours, theirs = result["ours"], result["yardstick"]
    shares = [x["tflop"] / x["seconds"] / x["product"] for x in (ours, theirs)]
    return (
        f"{result['workload']:<10}{result['variant']:<18}{ours['seconds']:>9.3f}{theirs['seconds']:>11.3f}"
        f"{result['ratio']:>9.2f} ({result['lowest']:.2f} to {result['highest']:.2f})"
        f"{ours['product']:>10.3f}{theirs['product']:>9.3f}{shares[0]:>8.0%}{shares[1]:>7.0%}"
        f"{ours['cpu_seconds']:>10.3f}{theirs['cpu_seconds']:>9.3f}"
    )


HEAD = (
    f"{'workload':<10}{'yardstick':<18}{'ours, s':>9}{'theirs, s':>11}{'times as fast':>24}"
    f"{'product, TFLOP/s':>19}{'share of it':>15}{'CPU, s':>19}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/bench_mid.py")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of " + ", ".join(WORKLOADS))
    parser.add_argument("--variants", default=",".join(DEFAULT), help="of the yardstick: " + ", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="field of both sides' config")
    parser.add_argument("--json", default="", help="also write the results to this file")
    args = parser.parse_args()
    overrides = dict(item.split("=", 1) for item in args.set)
    workloads, variants = args.workloads.split(","), args.variants.split(",")
    if unknown := {*workloads} - {*WORKLOADS} | {*variants} - {*VARIANTS}:
        parser.error(f"unknown workload or variant: {', '.join(sorted(unknown))}")
    results = []
    for workload in workloads:
        settings = {"config": args.config, "workload": workload, "overrides": overrides}
        ours = Worker("compare_ours", settings)
        for variant in variants:
            try:
                yardstick = Worker("compare_yardstick", {**settings, **VARIANTS[variant]})
            except ChildProcessError as error:  # for example FlexAttention in training on a CPU
                print(f"{workload:<10}{variant:<18}does not run: {error}", flush=True)
                continue
            if not results:
                print(f"ours: {ours.facts['about']}\nyardstick: {yardstick.facts['about']}\n{HEAD}")
            results.append({"workload": workload, "variant": variant, **compare(ours, yardstick, args.rounds)})
            yardstick.close()
            print(row(results[-1]), flush=True)
        ours.close()
    print("Settings that were tried:")
    for result in results:
        for side in ("ours", "yardstick"):
            print(
                f"  {result['workload']}, {side}: {result[side]['settings']}, {result[side]['tflop']:.4g} TFLOP a call"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
