"""Samples of a sweep side by side: a picture for each budget, a row for each setting, the same noise in a column."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from PIL import Image

from madformer_jax.reports.results import Budget, ProtocolGroup, Results, overrides_key
from madformer_jax.runtime import storage


class Strip(NamedTuple):
    """The first images of a setting at a budget, in a row."""

    label: str
    png: bytes


def load_strips(results: Results, part: ProtocolGroup) -> list[tuple[Budget, list[Strip]]]:
    """For each budget the row of each setting whose grid has one.

    Raises:
      ConfigError: a grid cannot be read.
    """
    grids = {run["name"]: run for run in results.runs if run.get("grid")}
    found: dict[Budget, list[Strip]] = {}
    for point in part.points:
        if run := grids.get(point.run):
            drawn = [_sampling_key(run, place) for place in run["grid_rows"]]
            if (key := _sampling_key(run, point.place)) in drawn:
                png = _crop_row(run["folder"] / run["grid"], drawn.index(key), len(drawn))
                found.setdefault(point.budget, []).append(Strip(part.label(point.setting), png))
    return [(budget, found[budget]) for budget in part.budgets if budget in found]


def _sampling_key(run: Mapping[str, Any], place: int) -> tuple[Any, ...]:
    """What decides the images of one of a run's evaluations: budgets of two kinds may come to the same."""
    evaluation = run["evaluations"][place]
    return overrides_key(evaluation["overrides"]), evaluation["cost"]["solver_steps"]


def _crop_row(path: epath.Path, row: int, rows: int) -> bytes:
    with storage.wrap_errors(f"{path} cannot be read"), Image.open(io.BytesIO(path.read_bytes())) as grid:
        height = grid.height // rows
        strip = grid.crop((0, row * height, grid.width, (row + 1) * height))
    file = io.BytesIO()
    strip.save(file, format="png")
    return file.getvalue()
