"""Prints the figures of the runs of benchmarks/gpu.sh as a table for the docs.

    python -m benchmarks.gpu_table FOLDER

A run is a subfolder with a benchmark.json (`--mode=benchmark`), or a sweep with the seconds that it took.
"""

import json
import pathlib
import sys
from collections.abc import Iterator

COLUMNS = ("run", "batch", "compile s", "seconds", "images/s", "TFLOP/s", "MFU", "GiB")


def rows(folder: pathlib.Path) -> Iterator[list[str]]:
    """Yields the cells of each measured part, and of each run without parts."""
    for path in sorted(folder.glob("*/seconds"), key=lambda path: path.stat().st_mtime):
        name, report = path.parent.name, path.parent / "benchmark.json"
        if not report.exists():
            yield [name, "", "", path.read_text().strip(), "", "", "", ""]
            continue
        figures = json.loads(report.read_text())
        for workload in ("train", "sample"):
            if workload in figures:
                x = figures[workload]
                batch = x.get("batch", round(x["images_per_second"] * x["seconds"]))
                yield [
                    f"{name}, {workload} on {figures['device']}", f"{batch:.0f}", f"{x['compile_seconds']:.0f}",
                    f"{x['seconds']:.3f}", f"{x['images_per_second']:.2f}", f"{x['tflops']:.1f}",
                    f"{x['mfu']:.1%}", f"{x.get('program_gib', 0):.1f}",
                ]  # fmt: skip


def main(folder: str) -> None:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows(pathlib.Path(folder))]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
