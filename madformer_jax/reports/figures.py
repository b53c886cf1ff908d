"""The figures of a report: small panels as SVG and PNG. Equal data give equal bytes.

`report_sections` chooses the panels: `cost_curves`, `axis_plots` and `heat_map`. `difference_figures`
has the panels of differences. A panel fits a column
of about 360 pixels, the width of a phone. Labels stand beside the lines instead of in a
legend. Backgrounds are transparent, and inks and colors have a middle lightness, so that a figure is
legible on white and on black. `html` replaces `INK` by the color of the page's text.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from madformer_jax.reports import comparisons
from madformer_jax.reports.axes import Axis
from madformer_jax.reports.formatting import format_number, score_heading
from madformer_jax.reports.intervals import Estimate
from madformer_jax.reports.results import COSTS, Budget, Point, ProtocolGroup, score_estimate

INK = "#787878"  # of text and axes; equally far from white and from black
_RULE = "#78787855"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "madformer", "svg.fonttype": "none", "font.size": 9.5, "font.family": ["DejaVu Sans"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.titlepad": 9, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "axes.grid.axis": "y", "grid.color": _RULE,
    "grid.linewidth": 0.7, "axes.axisbelow": True,
}  # fmt: skip
CATEGORY_COLORS = ("#3d85c9", "#d0662a", "#1f9678", "#c0629a", "#8a7bd0", "#b08a1e", "#787878")
_ORDERED_COLORS = ("#3f7fe0", "#17988a", "#bf8a16", "#d4546c")  # from the smallest to the largest value
_MARKERS = "osD^vPX"
_PANEL_INCHES = (4.1, 3.1)
LETTER_INCHES = 0.078  # upper bound of the mean width of a letter in a label
_MIN_LABEL_GAP = 0.075  # between two labels, as a share of the height


class Panel(NamedTuple):
    """A figure."""

    name: str  # of its files, without the suffix
    alt: str  # alternative text
    svg: bytes
    png: bytes


class Series(NamedTuple):
    """A labeled line: means over seeds at positions on the x axis."""

    label: str
    x: tuple[float, ...]
    y: tuple[Estimate, ...]
    dashed: bool = False


# ---- the panels of a protocol group


def cost_curves(group: ProtocolGroup, score: str, cost: str, axis: Axis | None = None) -> list[Panel]:
    """Plots a score against a cost, as in the paper's Figure 4.

    Args:
      axis: If given, a panel has a curve for each value of this axis, and each setting of the other
        axes has its own panel. If None, one panel has a curve for each setting.

    Returns:
      The panels. They are missing if the cost was not measured or has only one value.
    """
    panels = []
    unit, label = (1e9, "GFLOPs") if cost == "flops" else (1.0, COSTS[cost])
    for suffix, title, settings in panel_groups(group, axis, score):
        lines = []
        for name, setting in settings:
            points: dict[float, dict[int, Point]] = {}
            for point in group.points_at(setting):
                if cost in point.cost and score in point.scores:
                    points.setdefault(point.cost[cost] / unit, {})[point.seed] = point
            if points:
                x = tuple(sorted(points))
                means = [score_estimate(points[at].values(), score) for at in x]
                lines.append(Series(name, x, tuple(y for y in means if y is not None)))

        def draw(axes: Axes, lines: Sequence[Series] = lines) -> None:
            axes.set_xscale("log")
            set_x_ticks(axes, sorted({x for line in lines for x in line.x}), cost == "solver_steps")
            axes.set_xlabel(f"{label} per image")
            plot_series(axes, lines, series_colors(lines, axis), joined=True)

        if any(len(line.x) > 1 for line in lines):
            heading = f"{score_heading(score)}{title}{data_suffix(group)}"
            panels.append(make_panel(file_name(group, score, cost, suffix), heading, draw, lines, f", against {label}"))
    return panels


def axis_plots(group: ProtocolGroup, score: str, axis: Axis) -> list[Panel]:
    """Plots a score against the values of an axis.

    A panel has a line for each budget of a kind. Each kind of budget and each setting of the other axes
    has its own panel.
    """
    panels = []
    for (suffix, title, settings), budgets in itertools.product(
        panel_groups(group, axis, score), group.budgets_by_kind
    ):
        lines = []
        for budget in budgets:
            means = {}
            for position, (_, setting) in enumerate(settings):
                if (mean := score_estimate(group.points_at(setting, budget), score)) is not None:
                    means[float(position)] = mean
            lines.append(Series(str(budget) if len(budgets) > 1 else "", tuple(means), tuple(means.values())))
        names = [str(setting[group.axes.index(axis)]) for _, setting in settings]

        def draw(axes: Axes, lines: Sequence[Series] = lines, names: Sequence[str] = names) -> None:
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.4, len(names) - 0.6)
            axes.set_xlabel(axis.label)
            colored = [(line, color) for line, color in zip(lines, sequential_colors(len(lines))) if line.x]
            plot_series(axes, *zip(*colored), joined=is_ordered(axis))

        if any(len(line.x) > 1 for line in lines):
            heading = f"{score_heading(score)}{title}" + (f", at {budgets[0]}" if len(budgets) == 1 else "")
            heading += data_suffix(group)
            name = file_name(
                group, score, "by", axis.label, suffix, budgets[0].kind if len(group.budgets_by_kind) > 1 else ""
            )
            panels.append(make_panel(name, heading, draw, lines, f", by {axis.label}"))
    return panels


def heat_map(group: ProtocolGroup, score: str, rows: Axis, columns: Axis, budget: Budget) -> Panel:
    """Plots a score as a heat map over the two axes of a group, at one budget."""
    i, j = group.axes.index(rows), group.axes.index(columns)
    cells: dict[tuple[Any, Any], Estimate] = {}
    for setting in group.settings:
        if (mean := score_estimate(group.points_at(setting, budget), score)) is not None:
            cells[setting[i], setting[j]] = mean
    means = np.array([[cells[r, c].mean if (r, c) in cells else np.nan for c in columns.values] for r in rows.values])

    def draw(axes: Axes) -> None:
        axes.grid(False)
        shades = mpl.colors.LinearSegmentedColormap.from_list(
            "shades", mpl.colormaps["viridis"](np.linspace(0.15, 1, 64))
        )
        norm = mpl.colors.Normalize(np.nanmin(means), np.nanmax(means) or 1)
        axes.pcolormesh(np.ma.masked_invalid(means), cmap=shades, norm=norm, edgecolors="none")
        for (r, c), cell in cells.items():
            y, x = rows.values.index(r), columns.values.index(c)
            red, green, blue, _ = shades(norm(cell.mean))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.text(
                x + 0.5, y + 0.54, format_number(cell.mean), ha="center", va="bottom", color=ink, fontweight="bold"
            )
            if cell.high is not None:
                half = f"± {format_number(cell.high - cell.mean)}"
                axes.text(x + 0.5, y + 0.46, half, ha="center", va="top", color=ink, fontsize=8)
        axes.set_xticks(np.arange(len(columns.values)) + 0.5, list(map(str, columns.values)))
        axes.set_yticks(np.arange(len(rows.values)) + 0.5, list(map(str, rows.values)))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(columns.label)
        axes.set_ylabel(rows.label)

    heading = f"{score_heading(score)}, at {budget}{data_suffix(group)}"
    name = file_name(group, score, "heat", f"{budget.kind}-{budget.amount:g}")
    return make_panel(name, heading, draw, alt=f": {rows.label} against {columns.label}")


def panel_groups(
    group: ProtocolGroup, axis: Axis | None, score: str = ""
) -> Iterable[tuple[str, str, list[tuple[str, Any]]]]:
    """Splits the settings into panels, one for each combination of values of the other axes.

    Args:
      score: If given, panels of settings for which it measures different things are left out. The seam
        score of different L is an example.

    Yields:
      The suffix of the file name, the suffix of the title, and (label, setting) pairs.
    """
    if axis is None:
        if not score or comparisons.has_equal_scale(group, group.settings, score):
            yield "", "", [(group.label(setting), setting) for setting in group.settings]
        return
    at = group.axes.index(axis)
    others = [i for i, other in enumerate(group.axes) if i != at and len(other.values) > 1]
    groups: dict[Any, list[Any]] = {}
    for setting in group.settings:
        groups.setdefault(tuple(setting[i] for i in others), []).append(setting)
    for key, settings in groups.items():
        if score and not comparisons.has_equal_scale(group, settings, score):
            continue
        names = [f"{group.axes[i].label} = {value}" for i, value in zip(others, key)]
        labels = [(f"{axis.label} = {setting[at]}", setting) for setting in settings]
        yield "-".join(names), "".join(f", {name}" for name in names), labels


# ---- drawing


def plot_series(
    axes: Axes,
    lines: Sequence[Series],
    colors: Sequence[Any],
    *,
    joined: bool,
    linear: bool = False,
    spread: float = 0.012,
) -> None:
    """Draws the value of every seed, the means and their intervals.

    Args:
      joined: Whether lines join the means.
      linear: Whether the y axis is linear. By default it may be logarithmic.
      spread: Sideways distance of two lines, so that their intervals do not hide each other, as a share of
        the width.
    """
    _set_y_scale(axes, [v for line in lines for y in line.y for v in y.values], linear)
    log = axes.get_xscale() == "log"
    xs = [x for line in lines for x in line.x]
    width = math.log(max(xs) / min(xs)) if log else max(xs) - min(xs)
    ends = []
    for i, (line, color) in enumerate(zip(lines, colors, strict=True)):
        shift = spread * width * (i - (len(lines) - 1) / 2)
        x = [at * math.exp(shift) if log else at + shift for at in line.x]
        mean = [y.mean for y in line.y]
        axes.plot(
            x, mean, color=color, linewidth=1.4 if joined else 0, linestyle="--" if line.dashed else "-",
            marker="" if joined else "_", markersize=11, zorder=2,
        )  # fmt: skip
        for at, y in zip(x, line.y):
            if y.low is not None and y.high is not None:
                axes.plot([at, at], [y.low, y.high], color=color, linewidth=0.9, zorder=3)
            axes.plot(
                [at] * len(y.values), y.values, linestyle="", marker=_MARKERS[i % 7], markersize=4, markerfacecolor=color,
                markeredgewidth=0, zorder=4,
            )  # fmt: skip
        if line.label:
            ends.append((line.label, x[-1], mean[-1], color))
    if ends:
        _label_line_ends(axes, ends)


def _label_line_ends(axes: Axes, ends: Sequence[tuple[str, float, float, Any]]) -> None:
    """Places the labels at the right edge without overlap, in the order of the lines."""
    axes.get_ylim()  # makes matplotlib compute the final limits
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((x, y))[1]), i) for i, (_, x, y, _) in enumerate(ends))
    heights: list[float] = []
    for height, _ in placed:
        heights.append(max(height, heights[-1] + _MIN_LABEL_GAP) if heights else max(height, 0.0))
    overflow = max(0.0, heights[-1] - 1.0)
    for k in range(len(heights) - 1, -1, -1):
        limit = 1.0 if k == len(heights) - 1 else heights[k + 1] - _MIN_LABEL_GAP
        heights[k] = min(heights[k], limit) if overflow else heights[k]
    for (_, i), height in zip(placed, heights):
        label, x, y, color = ends[i]
        axes.annotate(
            label, (x, y), (1.03, height), xycoords="data", textcoords="axes fraction", color=color, va="center",
            fontweight="bold", fontsize=9, annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.6, "linestyle": ":", "shrinkA": 1, "shrinkB": 3,
                "relpos": (0, 0.5),  # from the left end of the label, so that it crosses no other label
            },
        )  # fmt: skip


def _set_y_scale(axes: Axes, values: Sequence[float], linear: bool) -> None:
    """Chooses a logarithmic scale if the values span more than a factor of 8, unless `linear`.

    The limits then hold all points; an interval may extend below the panel.
    """
    low, high = min(values), max(values)
    if not linear and low > 0 and high > 8 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.4, high * 1.4)
        axes.yaxis.set_major_locator(FixedLocator(_round_ticks(low / 1.4, high * 1.4)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}" if abs(y) > 1e-12 else "0"))


def set_x_ticks(axes: Axes, values: Sequence[float], exact: bool) -> None:
    """Puts the ticks at the values if these are exact and few, else at round numbers."""
    ticks = values if exact and len(values) <= 7 else _round_ticks(values[0], values[-1])
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _round_ticks(low: float, high: float) -> list[float]:
    """Returns two to seven ticks from low to high: 1, 2, 5, 10 and so on, or fewer per decade, or the ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{d}") for d, step in itertools.product(decades, steps)]
        if len(ticks := [x for x in ticks if low * 0.999 <= x <= high * 1.001]) <= 7:
            break
    return ticks if len(ticks) > 1 else [float(f"{x:.3g}") for x in (low, high)]


def is_ordered(axis: Axis) -> bool:
    """Returns whether the values of an axis are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)


def series_colors(lines: Sequence[Series], axis: Axis | None) -> Sequence[Any]:
    if axis is not None and is_ordered(axis):
        return sequential_colors(len(lines))
    return [CATEGORY_COLORS[i % len(CATEGORY_COLORS)] for i in range(len(lines))]


def sequential_colors(n: int) -> list[Any]:
    shades = mpl.colors.LinearSegmentedColormap.from_list("ordered", _ORDERED_COLORS)
    return [mpl.colors.to_hex(shades(x)) for x in np.linspace(0, 1, n)] if n > 1 else [CATEGORY_COLORS[0]]


def data_suffix(group: ProtocolGroup) -> str:
    """Returns the end of a title: name and size of the images."""
    return f"\n{group.data}" if group.data else ""


def make_panel(
    name: str, title: str, draw: Callable[[Axes], None], lines: Sequence[Series] = (), alt: str = "", inches: float = 0
) -> Panel:
    """Draws a figure that leaves room for the labels of the lines. It is `inches` wide or wider.

    Its alternative text is the title and `alt`.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # ignores the user's matplotlibrc
        mpl.rcParams.update(_STYLE)
        label_inches = 0.25 + LETTER_INCHES * max((len(line.label) for line in lines), default=0)
        width = max(_PANEL_INCHES[0], label_inches / 0.46, inches)  # 0.4 of it are left for the axes
        figure = Figure((width, _PANEL_INCHES[1]))
        right = 1 - label_inches / width
        axes = figure.add_axes((0.14, 0.15, right - 0.14, 0.7))
        axes.set_title(title, x=-0.12 if lines else 0)
        draw(axes)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(
            svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        figure.savefig(png, format="png", transparent=True, dpi=160, metadata={"Software": None})
    return Panel(name, f"{title}{alt}".replace("\n", ", "), svg.getvalue(), png.getvalue())


def file_name(group: ProtocolGroup, *words: str) -> str:
    """Joins words to the name of a file."""
    return safe_name("-".join(filter(None, (group.name, *words))))


def safe_name(joined: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in joined.replace(" = ", "")).lower()
