"""Scores by block number (`evaluate.by_block`): how good each block is after true and after own blocks.

Results of runs hold them under `held_out_blocks`, one row for each block (`evaluation.by_block.table`).
`report_sections` shows the panels and the table. The scores are those of a run's first evaluation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from madformer_jax.reports import comparisons, figures
from madformer_jax.reports.figures import Panel, Series
from madformer_jax.reports.formatting import Cell, Table
from madformer_jax.reports.intervals import Estimate, estimate
from madformer_jax.reports.results import ProtocolGroup, Results

KEY = "held_out_blocks"  # in result.json
CAPTION = (
    "Solid lines: after the true blocks of the image. Dashed lines: after blocks that the model sampled. Dots are training "
    "seeds, lines their means, bars the 95 % t-interval of one mean. Blocks of another image raise the loss even if they are "
    "real. The exposure bias therefore is the loss after sampled blocks minus that after real blocks of another image. Losses "
    "are comparable only between settings with the same target."
)
_COLUMNS = (  # header, name of the score, context
    ("bits per dimension", "bits", None),
    ("loss, true", "loss", "true"),
    ("loss, other image", "loss", "other"),
    ("loss, own", "loss", "own"),
    ("exposure bias", "exposure_bias", None),
    ("KID, true", "kernel_distance", "true"),
    ("KID, own", "kernel_distance", "own"),
)

Rows = Sequence[Mapping[str, Any]]  # the scores of each block
Setting = tuple[Any, ...]


_Contexts = tuple[str | None, ...]
_FIGURES: tuple[tuple[str, str, _Contexts], ...] = (  # score, title, contexts of the solid and of the dashed line
    ("loss", "Image loss by block ↓", ("true", "own")),
    ("exposure_bias", "Exposure bias by block ↓", (None,)),
    ("kernel_distance", "KID by block ↓", ("true", "own")),
)


def block_rows(results: Results, group: ProtocolGroup) -> dict[Setting, list[Rows]]:
    """Returns the rows of each setting, one entry for each training seed; empty if no run has them.

    Settings of a single block are left out: no block comes before it.
    """
    runs = {run["name"]: run for run in results.runs}
    by_setting: dict[Setting, dict[int, Rows]] = {}
    for point in group.points:
        run = runs[point.run]
        if comparisons.is_first_evaluation(run, point) and len(run.get(KEY, ())) > 1:
            by_setting.setdefault(point.setting, {})[point.seed] = run[KEY]
    return {setting: [rows for _, rows in sorted(seeds.items())] for setting, seeds in by_setting.items()}


def panels(results: Results, group: ProtocolGroup) -> list[Panel]:
    """Plots each score against the number of the block, with a color for each setting.

    Settings of a grid are split into panels as in `figures.cost_curves`.
    """
    rows = block_rows(results, group)
    axis = group.varying_axes[0] if group.varying_axes and group.is_grid else None
    out = []
    for score, score_title, contexts in _FIGURES:
        for suffix, title, settings in figures.panel_groups(group, axis):
            named = [(label, rows[setting]) for label, setting in settings if setting in rows]
            if not named:
                continue
            colors = figures.series_colors([Series(label, (), ()) for label, _ in named], axis)
            lines, styles = _lines(score, contexts, named), [color for color in colors for _ in contexts]
            heading = f"{score_title}{title}{figures.data_suffix(group)}"
            name = figures.file_name(group, "blocks", score, suffix)
            out.append(_panel(name, heading, lines, styles, has_zero="bias" in score))
    return out


def _lines(score: str, contexts: _Contexts, settings: Sequence[tuple[str, list[Rows]]]) -> list[Series]:
    """Returns a line for each setting and context. The last context of a setting has its label."""
    lines = []
    for label, seeds in settings:
        for i, context in enumerate(contexts):
            y = tuple(_estimate(seeds, block, score, context) for block in range(len(seeds[0])))
            x = tuple(float(row["block"]) for row in seeds[0])
            name = context or "" if len(settings) == 1 else label * (i == len(contexts) - 1)
            lines.append(Series(name, x, y, dashed=i > 0))
    return lines


def _panel(name: str, heading: str, lines: Sequence[Series], colors: Sequence[Any], has_zero: bool) -> Panel:
    blocks = int(max(x for line in lines for x in line.x))
    spread = min(0.012, 0.5 / len(lines) / (blocks - 1))  # within half a block

    def draw(axes: Axes) -> None:
        axes.set_xlabel("block, in the order of generation")
        axes.set_xticks(range(1, blocks + 1, -(-blocks // 7)))
        if has_zero:
            axes.axhline(0, color=figures.INK, linewidth=0.8)
        figures.plot_series(axes, lines, colors, joined=True, linear=has_zero, spread=spread)

    return figures.make_panel(name, heading, draw, lines)


def _estimate(seeds: Sequence[Rows], block: int, score: str, context: str | None) -> Estimate:
    """Returns the mean of a score over seeds."""
    cells = [rows[block][score] for rows in seeds]
    return estimate([(cell[context] if context else cell)["value"] for cell in cells])


def table(results: Results, group: ProtocolGroup) -> Table | None:
    """Returns the scores of every setting and block; None if no run has them."""
    rows: list[tuple[Cell, ...]] = [
        (
            group.label(setting),
            str(row["block"]),
            *(_estimate(seeds, block, score, context) for _, score, context in _COLUMNS),
        )
        for setting, seeds in block_rows(results, group).items()
        for block, row in enumerate(seeds[0])
    ]
    if not rows:
        return None
    note = (
        "True, other image, own: the blocks before it are those of the image, of another image of the same label, or sampled "
        "by the model. Exposure bias: loss, own minus loss, other image. Above 0, sampled blocks mislead the model more than real "
        "blocks of another image do. KID: kernel distance of sampled to true blocks, on pixels or latents. It is not comparable "
        "with the KID of images. Lower is better for bits per dimension, the loss after true blocks, and KID. Intervals are those "
        "of single means over seeds (95 %, not simultaneous)."
    )
    header = ("setting", "block", *(name for name, *_ in _COLUMNS))
    return Table(f"Scores by block ({group.data})", header, tuple(rows), note=note)
