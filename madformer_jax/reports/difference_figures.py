"""The figures of differences between settings, with simultaneous intervals.

`report_sections` shows them first on the page.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from madformer_jax.reports import comparisons, figures
from madformer_jax.reports.figures import Panel, Series
from madformer_jax.reports.formatting import score_heading
from madformer_jax.reports.intervals import Estimate
from madformer_jax.reports.results import Budget, ProtocolGroup


def difference_bands(group: ProtocolGroup, score: str, budgets: Sequence[Budget]) -> Panel | None:
    """Plots the difference of each setting to its baseline against the budget, with simultaneous intervals.

    The budgets have one kind. Returns None if fewer than two of them have a difference.
    """
    pairs = comparisons.contrasts(group, score)
    labels, baseline = comparisons.difference_labels(group, pairs)
    lines = []
    for label, pair in zip(labels, pairs):
        rows = comparisons.along_budgets(group, score, budgets, pair, len(pairs))
        if len(rows) > 1:
            x = tuple(budget.amount for budget, _ in rows)
            lines.append(Series(label, x, tuple(d.estimate for _, d in rows)))
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        figures.set_x_ticks(axes, sorted({x for line in lines for x in line.x}), True)
        axes.set_xlabel(f"budget of an image, {budgets[0].unit}")
        axes.axhline(0, color=figures.INK, linewidth=0.8)
        colors = figures.sequential_colors(len(lines) + 1)[1:] if group.is_grid else figures.series_colors(lines, None)
        figures.plot_series(axes, lines, colors, joined=True, linear=True)

    minus = f" minus {baseline}" if baseline else ", differences"
    heading = f"{score_heading(score)}{minus}{figures.data_suffix(group)}"
    name = figures.file_name(group, score, "difference", budgets[0].kind)
    return figures.make_panel(name, heading, draw, lines, ", with simultaneous intervals against the budget")


def difference_rows(name: str, title: str, rows: Sequence[tuple[str, Estimate]]) -> Panel:
    """Plots differences as dots with simultaneous intervals, one below the other."""

    def draw(axes: Axes) -> None:
        axes.grid(False)
        axes.axvline(0, color=figures.INK, linewidth=0.8, linestyle=":")
        for y, (label, x) in enumerate(reversed(rows)):
            color = figures.CATEGORY_COLORS[1 if x.sign else 0]
            if x.low is not None and x.high is not None:
                axes.plot([x.low, x.high], [y, y], color=color, linewidth=1.6)
            axes.plot([x.mean], [y], marker="o", markersize=6, color=color)
            axes.annotate(label, (0, y + 0.2), xycoords=("axes fraction", "data"), fontsize=9, va="bottom")
        axes.set_ylim(-0.5, len(rows) - 0.2)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    longest = max(len(label) for label, _ in rows)
    return figures.make_panel(figures.safe_name(name), title, draw, inches=longest * figures.LETTER_INCHES / 0.86)
