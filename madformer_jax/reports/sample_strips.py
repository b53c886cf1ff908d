"""Rows of samples for the report: one picture for each budget and setting.

`report_sections` shows the strips of a budget below each other. Images in a column start from the same
noise. The strips are cut from the grid.png of each run.
"""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from PIL import Image

from madformer_jax.reports.results import Budget, ProtocolGroup, Results, overrides_key
from madformer_jax.runtime import storage


class Strip(NamedTuple):
    """The first samples of a setting at a budget, in a row."""

    label: str
    png: bytes


def load_strips(results: Results, group: ProtocolGroup) -> list[tuple[Budget, list[Strip]]]:
    """Returns, for each budget, the strips of the settings that have samples. A run without its grid.png has none.

    Raises:
      ConfigError: A grid.png cannot be read.
    """
    grids = {run["name"]: run for run in results.runs if run.get("grid")}
    strips: dict[Budget, list[Strip]] = {}
    for point in group.points:
        if run := grids.get(point.run):
            rows = [_sampling_key(run, i) for i in run["grid_rows"]]
            path = run["folder"] / run["grid"]
            if (key := _sampling_key(run, point.evaluation_index)) in rows and path.exists():
                png = _crop_row(path, rows.index(key), len(rows))
                strips.setdefault(point.budget, []).append(Strip(group.label(point.setting), png))
    return [(budget, strips[budget]) for budget in group.budgets if budget in strips]


def _sampling_key(run: Mapping[str, Any], index: int) -> tuple[Any, ...]:
    """Returns the settings that decide the images of an evaluation.

    Budgets of two kinds may lead to equal settings.
    """
    evaluation = run["evaluations"][index]
    return overrides_key(evaluation["overrides"]), evaluation["cost"]["solver_steps"]


def _crop_row(path: epath.Path, row: int, rows: int) -> bytes:
    """Returns one of the `rows` rows of an image file as PNG."""
    with storage.wrap_errors(f"{path} cannot be read"), Image.open(io.BytesIO(path.read_bytes())) as grid:
        height = grid.height // rows
        strip = grid.crop((0, row * height, grid.width, (row + 1) * height))
    file = io.BytesIO()
    strip.save(file, format="png")
    return file.getvalue()
