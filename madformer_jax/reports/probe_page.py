"""The page of --mode=probe: similarity and attention by layer, and the loss under reuse."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from madformer_jax.reports import html
from madformer_jax.reports.figures import CATEGORY_COLORS, Panel, Series, make_panel, plot_series
from madformer_jax.reports.formatting import Table, format_number
from madformer_jax.reports.intervals import estimate
from madformer_jax.reports.report_sections import Figures, Section, Text

TITLE = "Where to cut the model"


def render(
    similarity: dict[str, Sequence[float]],
    masses: dict[str, Sequence[float]],
    reuse_loss: dict[int, float],
    block_losses: tuple[Sequence[float], Sequence[float]],
    suggested: int,
    tolerance: float,
    description: str,
) -> str:
    """Returns the page.

    Args:
      similarity: Name -> cosine similarity of each layer, N values.
      masses: Name -> share of the attention of each layer, N values.
      reuse_loss: Number of reused layers -> loss, from N - D to N.
      block_losses: Loss of each block after true blocks, and after the model's own estimates of them.
      tolerance: Largest relative increase of the loss.
    """
    depth, ar_depth = max(reuse_loss), min(reuse_loss)
    panels = (
        _layer_panel("similarity", "Cosine similarity across steps", similarity, ar_depth),
        _layer_panel("attention", "Share of attention", masses, ar_depth),
    )
    rule = (
        f"Suggested D: {suggested} of N = {depth} layers. It is the smallest D for which later solver steps can reuse the "
        "output that the other layers had at the first step, while the loss of these steps rises by at most "
        f"{100 * tolerance:.3g} %. The loss is measured without training the model for the new cut."
    )
    caption = (
        f"Shaded: the first {ar_depth} layers are AR layers, which run once." if ar_depth else "All layers are now diffusion layers."
    )  # fmt: skip
    sections = [
        Section("The cut", (Text((rule,)),)),
        Section("By layer", (Figures("", panels, f"Layers count from 1. {caption}"),)),
        Section("Reuse", (_loss_table(reuse_loss, suggested),)),
        Section("Context", (_context_table(*block_losses),)),
    ]
    return html.render_page(TITLE, description, sections)


def _layer_panel(name: str, title: str, values: dict[str, Sequence[float]], ar_depth: int) -> Panel:
    """Plots a line over the layers for each name."""
    lines = [
        Series(label, tuple(range(1, len(y) + 1)), tuple(estimate([float(v)]) for v in y))
        for label, y in values.items()
    ]

    def draw(axes: Axes) -> None:
        if ar_depth:
            axes.axvspan(0.5, ar_depth + 0.5, color="#78787822", linewidth=0)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plot_series(axes, lines, CATEGORY_COLORS[: len(lines)], joined=True)

    return make_panel(name, title, draw, lines, " by layer")


def _loss_table(reuse_loss: dict[int, float], suggested: int) -> Table:
    depth, base = max(reuse_loss), reuse_loss[min(reuse_loss)]
    rows = tuple(
        (
            str(m),
            f"{depth - m}{' (suggested)' * (depth - m == suggested)}",
            format_number(loss),
            f"{100 * (loss / base - 1):+.1f} %",
        )
        for m, loss in sorted(reuse_loss.items())
    )
    title = "Loss at later steps if the first layers keep their output of the first step"
    note = "With D = 0 only the U-Net sees the noise level."
    return Table(title, ("reused layers", "D", "loss", "change"), rows, note=note)


def _context_table(true: Sequence[float], estimated: Sequence[float]) -> Table:
    rows = tuple(
        (str(i), format_number(a), format_number(b), f"{100 * (b / a - 1):+.1f} %")
        for i, (a, b) in enumerate(zip(true, estimated, strict=True), 1)
    )
    title = "Loss by block, after true blocks and after the model's own estimates of them"
    note = "A change that grows over the blocks means that errors add up. Nothing comes before block 1."
    return Table(title, ("block", "after true blocks", "after estimates", "change"), rows, note=note)
